"""The memory of a step: the most that a device's allocator gave, what was left, and what forward kept for backward."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .measure import Contender, Step

_LEAK_STEPS = 4


@dataclass(frozen=True)
class Memory:
    """Bytes over what was allocated before an action: the most during it, and what it leaves."""

    peak: int
    left: int


def memory(contender: Contender, part: str, device: str) -> Memory:
    """Memory of a part's step after a warm-up step; its result is dropped. A backward leaves less than nothing."""
    contender.step(0)
    if part == "backward":
        backward = contender.forward(0)
        return held_by(lambda: backward(False), device)
    step = contender.begin(part)
    return held_by(lambda: step(0), device)


def leaked(step: Step, device: str) -> int:
    """Bytes that a step leaves behind, on average over some, each on another set. What refers to itself is no leak, nor
    is what only a first use leaves."""

    def run() -> None:
        for i in range(_LEAK_STEPS):
            step(i)

    def run_and_collect() -> None:
        run()
        gc.collect()

    if held_by(run, device).left <= 0:
        return 0
    gc.collect()
    return max(0, held_by(run_and_collect, device).left) // _LEAK_STEPS


def held_by(action: Callable[[], object], device: str) -> Memory:
    """Memory of what `action` does, from the device's own allocator. No garbage is collected of itself meanwhile: what
    refers to itself lives until then, and whose it is could not be told."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _held_on_cuda(action) if device == "cuda" else _held_on_cpu(action)
    finally:
        if enabled:
            gc.enable()


def _held_on_cuda(action: Callable[[], object]) -> Memory:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)


def _held_on_cpu(action: Callable[[], object]) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler first starts: it logs to stderr otherwise
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        action()
    # The CPU allocator keeps no peak: replay its trace. nbytes is negative where memory is freed.
    trace = [
        (event.start_ns(), event.nbytes()) for event in profile.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, nbytes in sorted(trace, key=lambda entry: entry[0]):
        held += nbytes
        peak = max(peak, held)
    return Memory(peak, held)


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> int:
    """Bytes that `forward` keeps for its backward, each storage once; parameters are there anyway and do not count."""
    ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so no address is used twice while it is counted

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())
