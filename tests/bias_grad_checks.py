"""The checks of bias_grad, each a function of an implementation: tests and planted faults run the same."""

from collections.abc import Callable

import bounds
import bounds_sums
import numpy as np
import torch
from cases import LAYOUTS, lay_out
from torch import Tensor

from peft_kernels.kernels.bias_grad import op, reference

Run = Callable[[Tensor, torch.dtype], Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS, COLUMNS = (0, 1, 3, 17, 1000), (1, 3, 8, 33, 1000)
LARGE = ((8192, 72), (2053, 4099), (5, 20_011), (30_011, 2))
"""Past every tile, block and span: many rows, many columns, ragged ends of both."""


def run_of(name: str) -> Run:
    """What the tests' `impl` of this name, "reference", "op" or "triton" with or without "[cuda]", is for this op."""
    kind = name.partition("[")[0]
    return {
        "reference": reference.bias_grad,
        "op": op.bias_grad,
        "triton": op.triton_impl and op.triton_impl.bias_grad,
    }[kind]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient(M: int, N: int, dtype: torch.dtype, device: str, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator().manual_seed(M + N)
    return lay_out(torch.randn(M, N, generator=generator, dtype=torch.float64).to(dtype).to(device), layout)


def check(run: Run, dy: Tensor) -> None:
    """dbias in dy's dtype and in the accumulator's, within the bounds."""
    for dtype in {dy.dtype, wide(dy.dtype)}:
        dbias = run(dy, dtype)
        assert dbias.dtype == dtype and dbias.is_contiguous(), f"dbias is {dbias.dtype}, asked for {dtype}"
        bounds.assert_within(dbias, *bounds_sums.bias_grad(dy, dtype), f"dbias of {list(dy.shape)} {dy.stride()}")


def check_sizes(run: Run, dtype: torch.dtype, device: str) -> None:
    for M in ROWS:
        for N in COLUMNS:
            check(run, gradient(M, N, dtype, device))


def check_layouts(run: Run, dtype: torch.dtype, device: str) -> None:
    for layout in LAYOUTS:
        for M, N in ((1, 40), (17, 33), (1000, 3), (203, 300)):
            check(run, gradient(M, N, dtype, device, layout))
    column = gradient(40, 1, dtype, device)
    check(run, column.expand(40, 70))
    check(run, column[:1].expand(40, 70))  # what y.sum().backward() gives
    check(run, gradient(90, 41, dtype, device)[::2, 3:40:3])


def check_same_sign(run: Run, dtype: torch.dtype, device: str) -> None:
    """A million terms of one sign: too narrow an accumulator stops growing, one long fp32 chain drifts."""
    dy = gradient(1_000_000, 3, dtype, device).abs()
    if dtype == torch.float16:
        dy = dy / 64  # the sum must fit
    check(run, dy)
    check(run, dy.t().contiguous().t())


def check_cancelling(run: Run, dtype: torch.dtype, device: str) -> None:
    """What cancels to zero leaves the small terms: what a chain has lost shows."""
    dy = gradient(4001, 40, dtype, device)
    check(run, torch.cat([dy, -dy.flip(0), gradient(3, 40, dtype, device) / 256]))


def check_not_finite(run: Run, dtype: torch.dtype, device: str) -> None:
    """inf and NaN come out as a plain sum gives them, in their column and in no other."""
    dy = gradient(517, 40, dtype, device)
    inf = torch.inf
    for column, values in enumerate(((inf,), (-inf,), (inf, -inf), (torch.nan,), (inf, inf))):
        for i, value in enumerate(values):
            dy[71 + 300 * i, 7 * column] = value
    expected = torch.zeros(40, dtype=torch.float64)
    expected[:29:7] = torch.tensor([inf, -inf, torch.nan, torch.nan, inf])
    for one in (dy, lay_out(dy, "transposed"), lay_out(dy, "columns")):
        dbias = run(one, dtype).to("cpu", torch.float64)
        same = torch.where(expected == 0, dbias.isfinite(), torch.isclose(dbias, expected, equal_nan=True))
        assert same.all(), f"{dbias.tolist()}, expected {expected.tolist()}, where 0 is any finite number"


def check_tiny(run: Run, dtype: torch.dtype, device: str) -> None:
    """Values near the bottom of the range, where only the underflow term of the bound is left."""
    check(run, gradient(300, 40, dtype, device) * torch.finfo(dtype).smallest_normal)


def check_repeats(run: Run, dtype: torch.dtype, device: str) -> None:
    """The same bits each time, and the input not written to."""
    for layout in ("contiguous", "transposed", "columns"):
        dy = gradient(1237, 130, dtype, device, layout)
        before, first = dy.clone(), run(dy, wide(dtype))
        assert all(torch.equal(first, run(dy, wide(dtype))) for _ in range(3)), "dbias differs between two runs"
        assert torch.equal(dy, before), "dy was written to"


def check_far(run: Run, dtype: torch.dtype, device: str) -> None:
    """Elements more than 2**31 apart: offsets are 64-bit numbers. On a CPU the memory between is never touched."""
    apart = 2**30 + 24
    if device == "cpu":
        memory = torch.from_numpy(np.zeros((2 * apart + 64) * dtype.itemsize, dtype=np.uint8)).view(dtype)
    else:
        memory = torch.empty(2 * apart + 64, dtype=dtype, device=device)
    for strides in ((apart, 1), (apart, 3), (1, apart), (3, apart)):
        rows, cols = (3, 20) if strides[0] == apart else (20, 3)
        dy = memory.as_strided((rows, cols), strides)
        check(run, dy.copy_(gradient(rows, cols, dtype, device)))


CHECKS = (check_sizes, check_layouts, check_cancelling, check_not_finite, check_tiny, check_repeats)
"""What every implementation goes through in every dtype; the two left out take longer."""
