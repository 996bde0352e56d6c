"""Honest timing and memory: contenders alternate in one process, on rotating inputs, and ratios are paired by round."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .environment import last_level_cache

Step = Callable[[int], object]
"""Runs one forward and backward on input set i (i is taken modulo the number of sets)."""

_BATCH_MS = 2.0  # an event pair has about 1 us of resolution and the clock of a launch gap: time at least this much
_MAX_BATCH = 64
_MAX_SETS = 32  # of inputs so small that more of them would only cost memory and set-up


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `rounds`, then on until `seconds` have passed, never more than `max_rounds`."""

    rounds: int = 50
    seconds: float = 1.0
    max_rounds: int = 400


@dataclass
class Contender:
    """One way to compute a case. `missing` says why it cannot run; `check` gives its worst error over its bound."""

    name: str
    role: str  # "floor", "ours" or "peer"
    step: Step | None = None
    sets: int = 1
    implementation: str = ""
    rival: str = ""  # the name of ours that this peer is set beside
    check: Callable[[], dict[str, float]] | None = None
    saved: Callable[[], int] | None = None
    missing: str = ""


@dataclass
class Timing:
    """Milliseconds of one contender, one per round; round i of all contenders of a comparison ran back to back."""

    samples: list[float] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with that median's 95 % confidence interval (order statistics, no model of noise)."""

    median: float
    low: float
    high: float


def ratio(above: Timing, below: Timing) -> Ratio:
    """above / below, paired by round, so that a machine that slows down for a while slows both."""
    values = sorted(a / b for a, b in zip(above.samples, below.samples, strict=True))
    n = len(values)
    spread = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - spread)), min(n - 1, math.ceil(n / 2 + spread) - 1)
    return Ratio(statistics.median(values), values[low], values[high])


def input_sets(set_bytes: int, device: str) -> int:
    """How many input sets to rotate so that together they are more than three times the last cache."""
    return min(_MAX_SETS, 3 * last_level_cache(device) // max(1, set_bytes) + 1)


def _rounds(effort: Effort):
    """Round numbers until the effort is spent."""
    begin = time.perf_counter()
    for i in range(effort.max_rounds):
        if i >= effort.rounds and time.perf_counter() - begin > effort.seconds:
            return
        yield i


def time_cpu(contenders: Sequence[Contender], effort: Effort) -> dict[str, Timing]:
    """Wall milliseconds of each contender's step, A-B-A-B, after two warm-up rounds; garbage collection is off.

    Every call takes the next set of inputs and every round starts with the next contender: none of them always goes
    first, and none finds in the cache what the one before it has just read.
    """
    for i in range(2):
        for contender in contenders:
            contender.step(i)
    timings = {contender.name: Timing() for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for i in _rounds(effort):
            first = i % max(1, len(contenders))
            for j, contender in enumerate((*contenders[first:], *contenders[:first])):
                begin = time.perf_counter()
                contender.step(i * len(contenders) + j)
                timings[contender.name].samples.append((time.perf_counter() - begin) * 1e3)
    finally:
        gc.enable()
    return timings


def _batch_size(run: Callable[[int], object]) -> int:
    """Launches per event pair: enough that a pair spans _BATCH_MS."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(4):
        run(i)
    end.record()
    end.synchronize()
    return max(1, min(_MAX_BATCH, math.ceil(_BATCH_MS / max(1e-3, start.elapsed_time(end) / 4))))


def _time_batches(runs: dict[str, tuple[Callable[[int], object], int]], effort: Effort) -> dict[str, Timing]:
    """Events around a batch of each run, A-B-A-B; run is (callable, steps that one call stands for)."""
    batches = {name: _batch_size(run) for name, (run, _) in runs.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for i in _rounds(effort):
        for name, (run, _) in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for j in range(batches[name]):
                run(i * batches[name] + j)
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: Timing([start.elapsed_time(end) / (batches[name] * runs[name][1]) for start, end in pairs])
        for name, pairs in events.items()
    }


def time_cuda(contenders: Sequence[Contender], effort: Effort) -> dict[str, Timing]:
    """Device milliseconds per step with each step launched from Python: launch gaps count, as they do for a user."""
    for i in range(3):
        for contender in contenders:
            contender.step(i)
    return _time_batches({contender.name: (contender.step, 1) for contender in contenders}, effort)


def capture(contender: Contender) -> torch.cuda.CUDAGraph:
    """One pass over all input sets of a contender as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            contender.step(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(contender.sets):
            contender.step(i)
    return graph


def time_graphs(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], effort: Effort) -> dict[str, Timing]:
    """Device milliseconds per step of captured graphs, each given with the steps it holds: no launch gaps."""

    def replay(graph: torch.cuda.CUDAGraph) -> Callable[[int], object]:
        return lambda _: graph.replay()

    return _time_batches({name: (replay(graph), steps) for name, (graph, steps) in graphs.items()}, effort)


@dataclass(frozen=True)
class Memory:
    """Bytes over what was allocated before an action: the most during it, and what it leaves."""

    peak: int
    left: int


def memory(step: Step, device: str) -> Memory:
    """Memory of one step after a warm-up step; its result is dropped."""
    step(0)
    gc.collect()
    return held_by(lambda: step(0), device)


def held_by(action: Callable[[], object], device: str) -> Memory:
    """Memory of what `action` does, from the device's own allocator."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
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
