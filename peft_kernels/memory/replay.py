"""Bytes at the worst moment of each phase, by kind, from a trace, in a GPU's caching allocator or a CPU's."""

from collections import Counter
from dataclasses import dataclass

from .allocator import MIB, Block, CachingAllocator
from .trace import PHASES, Piece, Trace

# What cuBLAS takes from the caching allocator at its first product in a thread (the caller's, and autograd's own for a
# device), by compute capability: at/cuda/CUDABlas.cpp of Torch 2.13, getChosenWorkspaceSize.
_CUBLAS_BYTES = {90: 32 * MIB, 100: 32 * MIB}
_CUBLAS_OTHER = 4096 * 2048 + 16 * 8192
_CUBLAS_THREADS = 2


def library_bytes(arch: int) -> int:
    """cuBLAS's workspaces in a training step on compute capability `arch` (90 for 9.0)."""
    return _CUBLAS_THREADS * _CUBLAS_BYTES.get(arch, _CUBLAS_OTHER)


@dataclass(frozen=True)
class Moment:
    """What is held at the worst moment of a phase.

    kinds: bytes asked for, by kind. allocated: with what the allocator adds to each block and what libraries hold.
    """

    allocated: int
    kinds: dict[str, int]
    during: str  # the operator at whose call it was reached

    @property
    def rounding(self) -> int:
        return self.allocated - sum(self.kinds.values())


@dataclass(frozen=True)
class Replay:
    """`phases`: the worst moment of each. `reserved`: the most that the allocator took from the card; None on a CPU.
    `saved`: bytes that forward left for backward, those of the loss too; `saved_blocks`: the memory that they take."""

    phases: dict[str, Moment]
    reserved: int | None
    saved: int
    saved_blocks: int

    @property
    def peak(self) -> Moment:
        return max(self.phases.values(), key=lambda moment: moment.allocated)


class _Exact:
    """A CPU's allocator: every byte asked for, nothing more."""

    def __init__(self):
        self.allocated = 0

    def malloc(self, nbytes: int) -> Block:
        self.allocated += nbytes
        return Block(nbytes, False, 0)

    def free(self, block: Block) -> None:
        self.allocated -= block.size


def check_arch(arch: int | None) -> None:
    if arch is not None and not (isinstance(arch, int) and 70 <= arch < 130):
        raise ValueError(f"arch is {arch!r}; expected a compute capability such as 90 for 9.0, or None for a CPU")


def _note(worst: dict[str, Moment], phase: str, moment: Moment) -> None:
    if phase not in worst or moment.allocated > worst[phase].allocated:
        worst[phase] = moment


def replay(trace: Trace, arch: int | None, capacity: int | None = None) -> Replay:
    """Run the trace through the allocator of a GPU of compute capability `arch`, or of a CPU (None).

    Raises:
        OutOfMemory: the GPU may reserve `capacity` bytes, and that is not enough.
        ValueError: an `arch` that is no compute capability, or a capacity for a CPU.
    """
    if arch is None and capacity is not None:
        raise ValueError(f"capacity is {capacity}, but arch is None: a CPU's memory has no limit here")
    check_arch(arch)
    allocator = _Exact() if arch is None else CachingAllocator(capacity)
    blocks: dict[Piece, Block] = {}
    saved = saved_blocks = began = 0
    before = ""
    held: Counter[str] = Counter()
    worst: dict[str, Moment] = {}
    if arch is not None:
        held["library"] = library_bytes(arch)
        for _ in range(_CUBLAS_THREADS):
            allocator.malloc(held["library"] // _CUBLAS_THREADS)
    for event in trace.events:
        piece = event.piece
        if piece.inside if arch is None else piece.on_host:
            continue  # a GPU kernel's declared temporaries are not a CPU's, the host's memory is not a GPU's
        if before == "forward" and event.phase == "backward":
            saved, saved_blocks = held["activations"] + held["logits"], allocator.allocated - began
        if event.phase != before:  # what the phase begins with may be its worst
            _note(worst, event.phase, Moment(allocator.allocated, dict(held), ""))
            began = allocator.allocated
        before = event.phase
        if event.freed:
            allocator.free(blocks.pop(piece))
            held[piece.kind] -= piece.nbytes
            continue
        blocks[piece] = allocator.malloc(piece.nbytes)
        held[piece.kind] += piece.nbytes
        if allocator.allocated > worst[event.phase].allocated:
            worst[event.phase] = Moment(allocator.allocated, dict(held), event.during)
    phases = {phase: worst[phase] for phase in PHASES if phase in worst}
    return Replay(phases, None if arch is None else allocator.peak_reserved, saved, saved_blocks)
