"""The timings of one part of a case: every contender that is sound, and why one has none after all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import measure
from .failures import FAILURES, because
from .held import memory
from .measure import Contender, Effort, Step, Timing


@dataclass
class Result:
    """What is known of one contender of a case; status is "ok" or why it is not timed."""

    contender: Contender
    status: str = "ok"
    error: float | None = None
    peak: int | None = None  # of forward and backward together
    saved: int | None = None


@dataclass
class Timed:
    """One part of a case, timed in one way; `failed`: why a contender that is sound has no times."""

    part: str
    timing: str
    times: Mapping[str, Timing]
    failed: dict[str, str]
    peaks: Mapping[str, int | None]


def _attempt(contenders: Sequence[Contender], start: Callable[[Contender], object]) -> tuple[dict, dict[str, str]]:
    """start(contender) of each by name, and why some could not."""
    started, failed = {}, {}
    for contender in contenders:
        try:
            started[contender.name] = start(contender)
        except FAILURES as error:
            failed[contender.name] = because(error)
    return started, failed


class _BrokeError(Exception):
    """A contender failed while all were timed."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _named(name: str, step: Step) -> Step:
    def run(i: int) -> None:
        try:
            step(i)
        except FAILURES as error:
            raise _BrokeError(name) from error

    return run


def _time(clock: Callable, steps: dict[str, Step], effort: Effort, failed: dict[str, str]) -> dict[str, Timing]:
    """Timings of the steps; one that fails meanwhile goes to `failed`, and the others are timed anew."""
    while True:
        try:
            return clock({name: _named(name, step) for name, step in steps.items()}, effort)
        except _BrokeError as broke:
            failed[broke.name] = because(broke.__cause__)
            del steps[broke.name]


def time_part(results: Sequence[Result], part: str, device: str, effort: Effort, graphs: bool) -> Iterator[Timed]:
    """ "wall" on a CPU; on a GPU "eager" and "graph"."""
    sound = [one.contender for one in results if one.status == "ok" and (part == "both" or one.contender.forward)]
    if part == "both":
        peaks = {result.contender.name: result.peak for result in results}
    else:
        peaks, _ = _attempt(sound, lambda contender: memory(contender, part, device).peak)
    steps, failed = _attempt(sound, lambda contender: contender.begin(part))
    if device != "cuda":
        yield Timed(part, "wall", _time(measure.time_cpu, steps, effort, failed), failed, peaks)
        return
    yield Timed(part, "eager", _time(measure.time_cuda, steps, effort, failed), failed, peaks)
    steps.clear()  # a backward's steps hold what its forwards saved
    if graphs:
        captured, failed = _attempt(sound, lambda contender: measure.capture(contender, part))
        yield Timed(part, "graph", measure.time_graphs(captured, effort), failed, peaks)
