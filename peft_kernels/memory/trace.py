"""What a training step allocates and frees, storage by storage, and what each storage was for."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._core.registry import WORKSPACE

PHASES = ("load", "forward", "backward", "step")


@dataclass(eq=False)
class Piece:
    """One storage, or the temporaries inside one call of an operator.

    Kinds are weights (parameters, frozen ones too, and buffers), inputs, gradients, optimizer (its states), activations
    (what forward leaves for backward), logits (the output layer's, and all that becomes of them in the loss, forward
    and backward) and temporaries (the rest).
    """

    nbytes: int
    kind: str = ""  # empty until it is known, which may be later
    inside: bool = False  # of a call, not made by it
    on_host: bool = False  # also where the rest is on a GPU


@dataclass(frozen=True)
class Event:
    """A piece comes to life, or (`freed`) goes."""

    piece: Piece
    phase: str
    freed: bool
    during: str  # the operator that runs


@dataclass
class Trace:
    events: list[Event] = field(default_factory=list)

    def finish(self) -> "Trace":
        """Name the pieces whose kind nothing told: what is left is temporary."""
        for event in self.events:
            event.piece.kind = event.piece.kind or "temporaries"
        return self


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor itself; of a wrapper subclass, those inside it."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]
    return [tensor]


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    return [plain.untyped_storage() for plain in plain_tensors(tensor)]


class Recorder(TorchDispatchMode):
    """Within the context, records every storage that an operator makes. The caller names the phases.

    An operator of this package shows its outputs only: its declared temporaries (WORKSPACE) come and go with its call.
    """

    def __init__(self):
        super().__init__()
        self.trace = Trace()
        self.phase = "load"
        self.in_head = False  # from the output layer on, forward, and up to it, backward
        self._live: dict[int, Piece] = {}
        self._during = ""

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what `tensors` are for; those not seen before come to life."""
        for tensor in tensors:
            for storage in _storages(tensor):
                piece = self._live.get(id(storage)) or self._born(storage)
                if piece is not None:
                    piece.kind = kind

    def leave_on_host(self, tensors: Iterable[Tensor]) -> None:
        """Say which of the tensors that are held take no memory of a GPU."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self._live[id(storage)].on_host = True

    def end_of_forward(self) -> None:
        """What lives now and has no kind is kept for backward."""
        for piece in self._live.values():
            piece.kind = piece.kind or "activations"

    def _born(self, storage: torch.UntypedStorage) -> Piece | None:
        nbytes = storage.nbytes()
        if nbytes == 0:
            return None
        piece = Piece(nbytes, "logits" if self.in_head else "")
        self._live[id(storage)] = piece
        self.trace.events.append(Event(piece, self.phase, False, self._during))
        weakref.finalize(storage, self._died, id(storage)).atexit = False
        return piece

    def _died(self, key: int) -> None:
        self.trace.events.append(Event(self._live.pop(key), self.phase, True, self._during))

    def _inside(self, nbytes: int) -> None:
        if nbytes == 0:
            return
        piece = Piece(nbytes, "temporaries", True)
        self.trace.events += (Event(piece, self.phase, freed, self._during) for freed in (False, True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._during = str(func)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                for storage in _storages(leaf):
                    if id(storage) not in self._live:
                        self._born(storage)
        if func.namespace == "peft_kernels" and func._opname in WORKSPACE:
            self._inside(WORKSPACE[func._opname](*args, **(kwargs or {})))
        return out
