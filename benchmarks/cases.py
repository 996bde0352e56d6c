"""The table of cases: which shapes of which primitive are measured where, and how one case becomes rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import bias_act, bias_grad, bitfit_memory, lora_linear, lora_memory, nf4, nf4_linear, norm, qlora_linear
from .bias_act import ActCase
from .bias_grad import BiasCase
from .failures import FAILURES, because
from .held import leaked, memory
from .lora_linear import LoRACase
from .measure import PARTS, Contender, Effort, ratio
from .memory_methods import Method
from .nf4 import NF4Case
from .nf4_linear import NF4LinearCase
from .norm_case import NormCase
from .part_times import Result, Timed, time_part
from .qlora_memory import METHODS as QLORA_METHODS
from .rows import Row, make_row

Case = LoRACase | BiasCase | ActCase | NormCase | NF4Case | NF4LinearCase
"""A label, a dtype, M, which parts of it can be timed, and whether compiled peers are set beside it."""


@dataclass(frozen=True)
class Primitive:
    """`contenders(case, device, seed)` binds every way to compute a case; `suites` names lists of cases; `methods` are
    the rows that it brings to the memory tables.

    Suites: "gpu" (what `make gpu` measures), "tiny" (its rehearsal on any CPU), "cpu" (the README's table), "speed"
    (pytest-benchmark).
    """

    contenders: Callable[[Case, str, int], list[Contender]]
    suites: dict[str, Sequence[Case]]
    of_layers: Callable[..., list[Case]]
    """(a model's linear layers as (in, out) features, M, R, dtype, dropout) -> cases."""
    methods: tuple[Method, ...] = ()
    work: Callable[[dict[str, float | str], str, bool], tuple[float, float]] | None = None
    """(values of a case's label, dtype's name, whether of the floor) -> bytes that must move, and FLOPs."""
    has_ops: bool = True  # of its own, whose implementations `make gpu` tests by name; else it is made of others'


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


def _bias_grad(*sizes: tuple[int, int]) -> list[BiasCase]:
    return [BiasCase(M, N, dtype) for dtype in (torch.float32, torch.bfloat16) for M, N in sizes]


def _bias_act(*sizes: tuple[int, int]) -> list[ActCase]:
    every = [(dtype, act) for dtype in (torch.float32, torch.bfloat16) for act in ("gelu", "gelu_tanh", "silu", "relu")]
    return [ActCase(M, N, dtype, act) for dtype, act in every for M, N in sizes]


def _norm(*sizes: tuple[int, int], dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> list[NormCase]:
    kinds = (("layer_norm", False), ("layer_norm", True), ("rms_norm", True))
    return [NormCase(*size, dtype, *kind) for dtype in dtypes for size in sizes for kind in kinds]


PRIMITIVES = {
    "bias_act": Primitive(
        bias_act.contenders,
        {
            "gpu": [ActCase(M, 16384, torch.bfloat16, "gelu", compiled=True) for M in (512, 2048, 8192)]
            + [ActCase(8192, 16384, torch.bfloat16, act) for act in ("gelu_tanh", "silu", "relu")],
            "tiny": _bias_act((33, 96)),
            "cpu": _bias_act((8192, 4096)),
            "speed": [ActCase(2048, 512, dtype) for dtype in (torch.float32, torch.bfloat16)],
        },
        bias_act.of_layers,
        work=bias_act.work,
    ),
    "bias_grad": Primitive(
        bias_grad.contenders,
        {
            "gpu": _bias_grad((512, 4096), (2048, 4096), (8192, 4096), (8192, 14336)),
            "tiny": _bias_grad((1, 96), (33, 96)),
            "cpu": _bias_grad((256, 4096), (2048, 4096), (8192, 4096)),
            "speed": _bias_grad((2048, 512)),
        },
        bias_grad.of_layers,
        bitfit_memory.METHODS,
        bias_grad.work,
    ),
    "lora_linear": Primitive(
        lora_linear.contenders,
        {
            "gpu": _lora_gpu(),
            "tiny": [LoRACase(M, 96, 64, 4, torch.bfloat16, p) for M in (1, 33) for p in (0.0, 0.1)],
            "cpu": _lora_cpu(),
            "speed": [LoRACase(256, 512, 512, 16, dtype) for dtype in (torch.float32, torch.bfloat16)],
        },
        lora_linear.of_layers,
        lora_memory.METHODS,
        lora_linear.work,
    ),
    "nf4": Primitive(nf4.contenders, nf4.SUITES, nf4.of_layers, work=nf4.work),
    "nf4_linear": Primitive(nf4_linear.contenders, nf4_linear.SUITES, nf4_linear.of_layers, work=nf4_linear.work),
    "norm": Primitive(
        norm.contenders,
        {
            "gpu": [NormCase(M, 4096, torch.bfloat16, compiled=True) for M in (512, 2048, 8192)]
            + _norm((8192, 1024), (8192, 16384), dtypes=(torch.bfloat16,)),
            "tiny": _norm((33, 96)),
            "cpu": _norm((8192, 384), (8192, 4096)),
            "speed": _norm((2048, 512)),
        },
        norm.of_layers,
        work=norm.work,
    ),
    "qlora_linear": Primitive(
        qlora_linear.contenders,
        {
            "gpu": [LoRACase(M, 4096, 4096, 16, torch.bfloat16) for M in (1, 16, 512, 2048, 8192)]
            + [LoRACase(8192, 4096, 4096, 64, torch.bfloat16, 0.1), LoRACase(8192, 14336, 4096, 16, torch.bfloat16)],
            "tiny": [LoRACase(M, 96, 64, 4, torch.bfloat16, p) for M in (1, 520) for p in (0.0, 0.1)],
            "cpu": [LoRACase(M, 2048, 2048, 16, d) for d in (torch.float32, torch.bfloat16) for M in (1, 64, 2048)],
            "speed": [LoRACase(256, 512, 512, 16, dtype) for dtype in (torch.float32, torch.bfloat16)],
        },
        qlora_linear.of_layers,
        QLORA_METHODS,
        has_ops=False,
    ),
}


def quick(cases: Sequence[Case]) -> list[Case]:
    """The same cases without the largest M: for a look, not for a figure."""
    largest = max(case.M for case in cases)
    smaller = [case for case in cases if largest > case.M]
    return smaller or [replace(case, M=min(256, case.M)) for case in cases]


def _status(errors: dict[str, float]) -> str:
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    if not wrong:
        return "ok"
    return "wrong values: " + ", ".join(f"{name} {error:.3g}x its bound" for name, error in wrong.items())


def _examine(contender: Contender, device: str) -> Result:
    """Values first, then what a step leaves behind: nothing is timed that is wrong or leaks."""
    if contender.missing:
        return Result(contender, contender.missing)
    try:
        errors = contender.check() if contender.check else {}
        result = Result(contender, _status(errors), max(errors.values(), default=None))
        if result.status == "ok":
            result.peak = memory(contender, "both", device).peak
            left = leaked(contender.step, device)
            result.status = f"leaks {left} bytes a step" if left else "ok"
            result.saved = contender.saved() if contender.saved else None
    except FAILURES as error:
        return Result(contender, because(error))
    return result


def _times(timed: Timed, contender: Contender, floor: str) -> dict[str, object]:
    """A contender's columns of times and ratios."""
    times, name = timed.times, contender.name
    if name not in times:
        return {}
    mine = times[name]
    values = {"samples": len(mine.samples), "ms_p50": mine.median}
    values |= {"ms_p20": mine.percentile(20), "ms_p80": mine.percentile(80)}
    if floor in times:
        over = ratio(mine, times[floor])
        values |= {"ratio_floor": over.median, "ratio_floor_low": over.low, "ratio_floor_high": over.high}
    if contender.rival in times:
        over = ratio(times[contender.rival], mine)
        values |= {"ours_over_this": over.median}
        values |= {"ours_over_this_low": over.low, "ours_over_this_high": over.high}
    return values


def _case_rows(primitive: str, case, results: Sequence[Result], timed: Timed, where: dict[str, str]) -> Iterator[Row]:
    floor = next((r.contender.name for r in results if r.contender.role == "floor"), "")
    for result in results:
        contender = result.contender
        if result.status == "ok" and timed.part != "both" and contender.forward is None:
            continue  # it cannot be taken apart
        yield make_row(
            primitive=primitive,
            case=case.label,
            dtype=str(case.dtype).removeprefix("torch."),
            contender=contender.name,
            part=timed.part,
            timing=timed.timing,
            role=contender.role,
            implementation=contender.implementation,
            status=timed.failed.get(contender.name, result.status),
            peak_bytes=timed.peaks.get(contender.name),
            saved_bytes=result.saved,
            error_over_bound=result.error,
            **_times(timed, contender, floor),
            **where,
        )


def run_case(
    primitive: str,
    case: Case,
    device: str,
    env: dict[str, str],
    effort: Effort | None = None,
    contenders: Sequence[Contender] | None = None,
    graphs: bool = True,
    parts: Sequence[str] = PARTS[:1],
    seed: int = 0,
) -> list[Row]:
    """Check, then time every contender of one case in this process.

    One row per contender, part and way of timing: "wall" on the CPU; "eager" and "graph" on CUDA. A contender that is
    not installed, fails, leaks or computes wrong values has a row whose status says so and no times. `contenders`
    replaces the primitive's own. Without `graphs` "eager" is all that is timed on CUDA. A part alone gets a quarter of
    the effort's seconds.
    """
    effort = effort or Effort()
    if contenders is None:
        contenders = PRIMITIVES[primitive].contenders(case, device, seed)
    results = [_examine(contender, device) for contender in contenders]
    rows, where = [], env | {"seed": str(seed)}
    for part in case.parts:
        if part not in parts:
            continue
        spent = effort if part == "both" else replace(effort, seconds=effort.seconds / 4)
        for timed in time_part(results, part, device, spent, graphs):
            rows += _case_rows(primitive, case, results, timed, where)
    return rows
