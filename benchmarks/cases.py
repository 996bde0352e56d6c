"""The table of cases: which shapes of which primitive are measured where, and how one case becomes rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import lora_linear, lora_memory, measure
from .lora_linear import LoRACase
from .measure import Contender, Effort
from .memory_methods import Method
from .rows import Row, make_row

try:
    from triton.errors import TritonError

    FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError, TritonError)
except ImportError:
    FAILURES = (RuntimeError, ValueError)
"""What a contender may raise without ending the run: its row then says so (out of memory is a RuntimeError)."""


@dataclass(frozen=True)
class Primitive:
    """`contenders(case, device)` binds every way to compute a case; `suites` names lists of cases; `methods` are the
    rows that it brings to the memory tables.

    Suites: "gpu" (what `make gpu` measures), "tiny" (its rehearsal on any CPU), "cpu" (the README's table), "speed"
    (pytest-benchmark).
    """

    contenders: Callable[[LoRACase, str], list[Contender]]
    suites: dict[str, Sequence[LoRACase]]
    methods: tuple[Method, ...] = ()
    work: Callable[[dict[str, float], str, bool], tuple[float, float]] | None = None
    """(sizes of a case, dtype's name, whether of the floor) -> bytes that must move and FLOPs, for the roofline."""


def _lora_gpu() -> list[LoRACase]:
    return [
        LoRACase(M, 4096, 4096, R, torch.bfloat16, dropout, compiled=M == 8192 and not dropout)
        for R in (16, 64)
        for M in (512, 2048, 8192)
        for dropout in (0.0, 0.1)
    ]


def _lora_cpu() -> list[LoRACase]:
    return [LoRACase(2048, 2048, 2048, R, dtype) for dtype in (torch.float32, torch.bfloat16) for R in (16, 64)]


LORA_CPU_SWEEP = [
    LoRACase(M, 2048, 2048, R, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for M in (1, 16, 256, 2048)
    for R in (4, 16, 64, 256)
]

PRIMITIVES = {
    "lora_linear": Primitive(
        lora_linear.contenders,
        {
            "gpu": _lora_gpu(),
            "tiny": [LoRACase(M, 96, 64, 4, torch.bfloat16, p) for M in (1, 33) for p in (0.0, 0.1)],
            "cpu": _lora_cpu(),
            "speed": [LoRACase(256, 512, 512, 16, dtype) for dtype in (torch.float32, torch.bfloat16)],
        },
        lora_memory.METHODS,
        lora_linear.work,
    )
}


def quick(cases: Sequence[LoRACase]) -> list[LoRACase]:
    """The same cases without the largest M: for a look, not for a figure."""
    largest = max(case.M for case in cases)
    smaller = [case for case in cases if largest > case.M]
    return smaller or [replace(case, M=min(256, case.M)) for case in cases]


def _status(contender: Contender, errors: dict[str, float]) -> str:
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    if not wrong:
        return "ok"
    return "wrong values: " + ", ".join(f"{name} {error:.3g}x its bound" for name, error in wrong.items())


def _failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


@dataclass
class Result:
    """What is known of one contender of a case; status is "ok" or why it is not timed."""

    contender: Contender
    status: str = "ok"
    error: float | None = None
    peak: int | None = None
    saved: int | None = None


def _examine(contender: Contender, device: str) -> Result:
    """Values first: nothing is timed whose values are wrong."""
    if contender.missing:
        return Result(contender, contender.missing)
    try:
        errors = contender.check() if contender.check else {}
        result = Result(contender, _status(contender, errors), max(errors.values(), default=None))
        if result.status == "ok":
            result.peak = measure.memory(contender.step, device).peak
            result.saved = contender.saved() if contender.saved else None
    except FAILURES as error:
        return Result(contender, _failure(error))
    return result


def _graphs(results: Sequence[Result], effort: Effort) -> tuple[dict[str, measure.Timing], dict[str, str]]:
    """Timings under CUDA graphs, and why a contender has none."""
    graphs, failed = {}, {}
    for result in results:
        try:
            graphs[result.contender.name] = measure.capture(result.contender), result.contender.sets
        except FAILURES as error:
            failed[result.contender.name] = _failure(error)
    return measure.time_graphs(graphs, effort), failed


def _case_rows(primitive, case, results, timing, timings, failed, env) -> Iterator[Row]:
    floor = next((r.contender.name for r in results if r.contender.role == "floor"), "")
    for result in results:
        name, rival = result.contender.name, result.contender.rival
        values = {"status": failed.get(name, result.status)}
        if name in timings:
            mine = timings[name]
            values |= {"samples": len(mine.samples), "ms_p50": mine.median}
            values |= {"ms_p20": mine.percentile(20), "ms_p80": mine.percentile(80)}
            if floor in timings:
                over = measure.ratio(mine, timings[floor])
                values |= {"ratio_floor": over.median, "ratio_floor_low": over.low, "ratio_floor_high": over.high}
            if rival in timings:
                over = measure.ratio(timings[rival], mine)
                values |= {"ours_over_this": over.median}
                values |= {"ours_over_this_low": over.low, "ours_over_this_high": over.high}
        yield make_row(
            primitive=primitive,
            case=case.label,
            dtype=str(case.dtype).removeprefix("torch."),
            contender=name,
            timing=timing,
            role=result.contender.role,
            implementation=result.contender.implementation,
            peak_bytes=result.peak,
            saved_bytes=result.saved,
            error_over_bound=result.error,
            **values,
            **env,
        )


def run_case(
    primitive: str,
    case: LoRACase,
    device: str,
    env: dict[str, str],
    effort: Effort | None = None,
    contenders: Sequence[Contender] | None = None,
    graphs: bool = True,
) -> list[Row]:
    """Check, then time every contender of one case in this process.

    One row per contender and way of timing: "wall" on the CPU; "eager" and "graph" on CUDA. A contender that is not
    installed, fails or computes wrong values has a row whose status says so and no times. `contenders` replaces the
    primitive's own. Without `graphs` "eager" is all that is timed on CUDA.
    """
    effort = effort or Effort()
    if contenders is None:
        contenders = PRIMITIVES[primitive].contenders(case, device)
    results = [_examine(contender, device) for contender in contenders]
    sound = [result for result in results if result.status == "ok"]
    if device != "cuda":
        timings = measure.time_cpu([result.contender for result in sound], effort)
        return list(_case_rows(primitive, case, results, "wall", timings, {}, env))
    timings = measure.time_cuda([result.contender for result in sound], effort)
    rows = list(_case_rows(primitive, case, results, "eager", timings, {}, env))
    if not graphs:
        return rows
    timings, failed = _graphs(sound, effort)
    return rows + list(_case_rows(primitive, case, results, "graph", timings, failed, env))
