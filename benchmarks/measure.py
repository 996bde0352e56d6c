"""Honest timing: contenders alternate in one process, on rotating inputs, and ratios are paired by round."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .environment import last_level_cache

Step = Callable[[int], object]
"""Runs one forward and backward, or a part of them, on input set i (i is taken modulo the number of sets)."""

Backward = Callable[[bool], object]
"""The backward of a forward that has run; told whether to keep what it uses, so that it can run again."""

PARTS = ("both", "forward", "backward")

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
    step: Step | None = None  # both, forward and backward
    forward: Callable[[int], Backward] | None = None  # where the two can be timed apart
    sets: int = 1
    implementation: str = ""
    rival: str = ""  # the name of ours that this peer is set beside
    check: Callable[[], dict[str, float]] | None = None
    saved: Callable[[], int] | None = None
    missing: str = ""

    def begin(self, part: str) -> Step:
        """A part's step. For the backward every input set's forward runs here, on the current stream, and what it saved
        is kept as long as the step is."""
        if part != "backward":
            return self.step if part == "both" else self.forward
        kept = [self.forward(i) for i in range(self.sets)]
        return lambda i: kept[i % self.sets](True)


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


def time_cpu(steps: Mapping[str, Step], effort: Effort) -> dict[str, Timing]:
    """Wall milliseconds of each contender's step in rounds, after two for warming up; garbage collection is off.

    Every call takes the next set of inputs, so none finds in the cache what the one before it has just read. Every
    round has an order of its own, the same on each run: who comes after one that leaves the caches full of what it has
    written pays for that, and it is not always the same one.
    """
    for i in range(2):
        for step in steps.values():
            step(i)
    timings = {name: Timing() for name in steps}
    order, dice = list(steps.items()), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for i in _rounds(effort):
            dice.shuffle(order)
            for j, (name, step) in enumerate(order):
                begin = time.perf_counter()
                step(i * len(order) + j)
                timings[name].samples.append((time.perf_counter() - begin) * 1e3)
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


def time_cuda(steps: Mapping[str, Step], effort: Effort) -> dict[str, Timing]:
    """Device milliseconds per step with each step launched from Python: launch gaps count, as they do for a user."""
    for i in range(3):
        for step in steps.values():
            step(i)
    return _time_batches({name: (step, 1) for name, step in steps.items()}, effort)


@dataclass(frozen=True)
class Captured:
    """One pass over all input sets of a contender as a CUDA graph, and the step, whose tensors the graph reads."""

    graph: torch.cuda.CUDAGraph
    step: Step
    sets: int


def capture(contender: Contender, part: str) -> Captured:
    """Warmed up and captured on one stream of its own: autograd runs a backward on the stream of its forward."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step = contender.begin(part)
        for i in range(3):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(contender.sets):
            step(i)
    return Captured(graph, step, contender.sets)


def time_graphs(graphs: Mapping[str, Captured], effort: Effort) -> dict[str, Timing]:
    """Device milliseconds per step of captured graphs: no launch gaps."""

    def replay(graph: torch.cuda.CUDAGraph) -> Callable[[int], object]:
        return lambda _: graph.replay()

    return _time_batches({name: (replay(one.graph), one.sets) for name, one in graphs.items()}, effort)
