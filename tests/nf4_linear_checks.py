"""The checks of nf4_linear's two ops, each a function of an implementation: tests and planted faults run the same."""

from collections.abc import Callable
from dataclasses import dataclass

import bounds
import bounds_nf4
import torch
from cases import LAYOUTS, lay_out
from torch import Tensor

from peft_kernels.formats.nf4 import BLOCKSIZES, NF4Weight, nested_code
from peft_kernels.kernels.nf4_linear import op, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Runs:
    """One implementation of the two ops; `fwd` and `bwd` take the ops' arguments."""

    fwd: Callable
    bwd: Callable


def runs_of(name: str) -> Runs | None:
    """What the tests' `impl` of this name, "reference", "op" or "triton" with or without "[cuda]", is for these ops."""
    kind = name.partition("[")[0]
    if kind == "op":
        return Runs(op.nf4_linear_fwd, op.nf4_linear_bwd)
    where = reference if kind == "reference" else getattr(op, "triton_impl", None)
    return where and Runs(where.nf4_linear_fwd, where.nf4_linear_bwd)


@dataclass(frozen=True)
class Case:
    """What to generate; the same for every implementation."""

    M: int
    N: int
    K: int
    dtype: torch.dtype = torch.float32
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    bias: torch.dtype | None = None
    addend: bool = False
    layout: str = "contiguous"  # of x, dy and the addends
    positive: bool = False  # values of one sign: long sums grow instead of cancelling

    def __str__(self) -> str:
        words = ["x".join(map(str, (self.M, self.N, self.K))), str(self.dtype).removeprefix("torch.")]
        words += [f"{self.quant_type}-{self.blocksize}"] + ["nested"] * self.nested + ["addend"] * self.addend
        words += [] if self.bias is None else ["bias-" + str(self.bias).removeprefix("torch.")]
        words += [] if self.layout == "contiguous" else [self.layout]
        return "-".join(words + ["positive"] * self.positive)


def weight_of(case: Case, device: str = "cpu", seed: int = 0) -> NF4Weight:
    """Any bytes and any scales are a weight: every code is there, and with them no rounding of a quantiser."""
    generator = torch.Generator().manual_seed(seed + 1)
    numel, largest = case.N * case.K, 1.0 if case.positive else 3.0
    blocks = -(-numel // case.blocksize)
    codes = torch.randint(0, 256, (-(-numel // 2),), generator=generator, dtype=torch.uint8)
    if case.positive:
        codes |= 0x88 if case.quant_type == "nf4" else 0
        codes &= 0xFF if case.quant_type == "nf4" else 0x77

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator) * largest + 0.1

    nested, absmax = (None, None, None), draw(blocks)
    if case.nested:
        absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        nested = draw(-(-blocks // 256)), nested_code(), torch.tensor([largest + 1.5])
    args = codes, absmax, *nested, (case.N, case.K), torch.float32, case.quant_type, case.blocksize
    return NF4Weight(*args).to(device)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dy: Tensor
    weight: NF4Weight
    bias: Tensor | None
    addend: Tensor | None  # [M, N]
    dx_addend: Tensor | None  # [M, K]

    def fwd_args(self) -> tuple:
        return self.x, *self.weight.tensors(), self.bias, self.addend, *self._settings(self.weight.shape[0])

    def bwd_args(self) -> tuple:
        return self.dy, *self.weight.tensors(), self.dx_addend, *self._settings(self.weight.shape[1])

    def _settings(self, columns: int) -> tuple:
        return self.weight.quant_type, self.weight.blocksize, columns


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple, size: float, dtype: torch.dtype = case.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn = drawn.abs() + 0.5 if case.positive else drawn
        return (drawn * size).to(dtype).to(device)

    M, N, K = case.M, case.N, case.K
    x_size, dy_size = (1 / max(1, K), 1 / max(1, N)) if case.positive else (1.0, 1.0)
    return Inputs(
        x=lay_out(draw((M, K), x_size), case.layout),
        dy=lay_out(draw((M, N), dy_size), case.layout),
        weight=weight_of(case, device, seed),
        bias=None if case.bias is None else draw((N,), 1.0, case.bias),
        addend=lay_out(draw((M, N), 1.0), case.layout) if case.addend else None,
        dx_addend=lay_out(draw((M, K), 1.0), case.layout) if case.addend else None,
    )


def check_forward(runs: Runs, case: Case, device: str = "cpu") -> None:
    data = inputs(case, device)
    y = runs.fwd(*data.fwd_args())
    assert y.dtype == case.dtype and y.is_contiguous(), f"y is {y.dtype} with strides {y.stride()}"
    bounds.assert_within(y, *bounds_nf4.forward(data.x, data.weight, data.bias, data.addend), f"y of {case}")


def check_backward(runs: Runs, case: Case, device: str = "cpu") -> None:
    data = inputs(case, device)
    dx = runs.bwd(*data.bwd_args())
    assert dx.dtype == case.dtype and dx.is_contiguous(), f"dx is {dx.dtype} with strides {dx.stride()}"
    bounds.assert_within(dx, *bounds_nf4.backward(data.dy, data.weight, data.dx_addend), f"dx of {case}")


def check(runs: Runs, case: Case, device: str = "cpu") -> None:
    check_forward(runs, case, device)
    check_backward(runs, case, device)


def check_sizes(runs: Runs, dtype: torch.dtype, device: str) -> None:
    """Nothing of it a multiple of anything, one of each, none of each; rows that begin in the middle of a byte."""
    sizes = [(37, 53, 71), (1, 65, 129), (2, 1, 1), (5, 3, 2), (67, 130, 257), (3, 70, 65), (1, 7, 1), (50, 64, 128)]
    for size in sizes + [(0, 5, 7), (3, 0, 7), (1, 0, 64), (3, 5, 0), (0, 0, 0)]:
        check(runs, Case(*size, dtype), device)
    for M in (1, 2, 5, 9):  # an empty sum, and what joins it
        check(runs, Case(M, 67, 0, dtype, bias=dtype, addend=True), device)


def check_formats(runs: Runs, dtype: torch.dtype, device: str) -> None:
    """Every blocksize of both types; blocks that cross rows, and scales in one level and in two."""
    for blocksize in BLOCKSIZES:
        for quant_type in ("nf4", "fp4"):
            for M, K in ((3, 96), (2, 192), (19, 77)):
                check(runs, Case(M, 70, K, dtype, quant_type, blocksize, nested=blocksize % 128 == 0), device)
    check(runs, Case(3, 300, 256, dtype, blocksize=32, nested=True), device)  # more than 256 blocks
    check(runs, Case(3, 300, 256, dtype, nested=True), device)


def check_layouts(runs: Runs, dtype: torch.dtype, device: str) -> None:
    for layout in LAYOUTS:
        for M, N, K in ((1, 40, 64), (9, 33, 65), (50, 31, 128)):
            check(runs, Case(M, N, K, dtype, layout=layout, addend=True), device)


def check_features(runs: Runs, dtype: torch.dtype, device: str) -> None:
    for M, K in ((1, 128), (7, 64), (41, 71)):
        for bias in (dtype, torch.float32, torch.float64, torch.bfloat16):
            check_forward(runs, Case(M, 77, K, dtype, bias=bias), device)
        check(runs, Case(M, 77, K, dtype, addend=True), device)
        check(runs, Case(M, 77, K, dtype, bias=dtype, addend=True, nested=True), device)


def check_rows(runs: Runs, dtype: torch.dtype, device: str) -> None:
    """Whatever M chooses another kernel: each is within the bound, so none differs from another by more than two."""
    for M in (*range(1, 14), 16, 17, 24, 25, 31, 47, 48, 49, 65, 97):
        check(runs, Case(M, 67, 192, dtype), device)


def check_long_sums(runs: Runs, dtype: torch.dtype, device: str) -> None:
    """Sums of one sign over K and over N: too narrow an accumulator stops growing, one long chain drifts.

    Not of fp64, where the truth is no better.
    """
    if dtype == torch.float64:
        return
    for M in (1, 2, 3, 9, 30):
        check(runs, Case(M, 3, 40_000, dtype, positive=True), device)
        check(runs, Case(M, 3, 40_001, dtype, positive=True), device)
        check(runs, Case(M, 20_000, 5, dtype, positive=True), device)


def check_not_finite(runs: Runs, dtype: torch.dtype, device: str) -> None:
    """inf and NaN come out in their own rows and columns, and in no other."""
    for M, N, K in ((1, 9, 128), (3, 40, 128), (8, 40, 128), (12, 40, 128), (40, 70, 129)):
        case = Case(M, N, K, dtype)
        data = inputs(case, device)
        data.x[0, 5], data.dy[0, 7] = torch.inf, torch.nan
        y, dx = runs.fwd(*data.fwd_args()), runs.bwd(*data.bwd_args())
        assert not y[0].isfinite().any() and y[1:].isfinite().all(), f"x[0, 5] = inf of {case}"
        assert dx[0].isnan().all() and dx[1:].isfinite().all(), f"dy[0, 7] = nan of {case}"
        data = inputs(case, device)
        data.weight.absmax[1] = torch.nan  # elements 64 to 127: row 0 of W alone
        y, dx = runs.fwd(*data.fwd_args()), runs.bwd(*data.bwd_args())
        assert y[:, 0].isnan().all() and y[:, 1:].isfinite().all(), f"the scale of elements 64 to 127 is NaN, of {case}"
        there = torch.zeros(K, dtype=torch.bool, device=device)
        there[64:128] = True
        assert dx[:, there].isnan().all() and dx[:, ~there].isfinite().all(), f"dx of {case}"


def check_repeats(runs: Runs, dtype: torch.dtype, device: str) -> None:
    """The same bits each time, and nothing that was given is written to."""
    for M, N, K in ((1, 67, 192), (5, 67, 192), (70, 67, 190)):
        data = inputs(Case(M, N, K, dtype, nested=True, addend=True, bias=dtype), device)
        given = [t for t in (*data.fwd_args(), *data.bwd_args()) if isinstance(t, Tensor)]
        before = [t.clone() for t in given]
        for run, args in ((runs.fwd, data.fwd_args()), (runs.bwd, data.bwd_args())):
            first = run(*args)
            assert all(torch.equal(first, run(*args)) for _ in range(3)), "two runs differ"
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was written to"


CHECKS = (
    check_sizes,
    check_formats,
    check_layouts,
    check_features,
    check_rows,
    check_long_sums,
    check_not_finite,
    check_repeats,
)
"""What every implementation goes through in every dtype."""
