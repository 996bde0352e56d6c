"""The Triton norm's value tests: on a GPU, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

test_norm_triton.py runs them, in a process of their own where there is no GPU.
"""

from dataclasses import replace

import interpreted
import norm_checks as checks
import pytest
import torch
from cases import LAYOUTS
from norm_cases import DTYPES, FULL, Kind, check, data, given_statistics, run_of

from peft_kernels.kernels._shared import columns
from peft_kernels.kernels.norm import triton_impl
from peft_kernels.kernels.norm.configs import STEPS, Tile, pick_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = run_of("triton")
SLOW = {"check_sizes", "check_long_rows", "check_repeats", "check_offsets", "check_layouts"}
"""What takes minutes under the interpreter, on 2 cores; the other tests here stand in for it."""
SMALL = {"check_kinds", "check_rows_not_finite"}

pytestmark = pytest.mark.usefixtures("poisoned")


def _taken(check, dtype: torch.dtype) -> bool:
    """All on a GPU; under the interpreter in fp32, whose bounds are the tight ones, and a few in the other dtypes."""
    if not interpreted.INTERPRETED:
        return True
    return check.__name__ in SMALL or (dtype == torch.float32 and check.__name__ not in SLOW)


@pytest.mark.parametrize(
    "check, dtype",
    [
        pytest.param(check, dtype, id=f"{check.__name__}-{dtype}")
        for check in (*checks.CHECKS, checks.check_far)
        for dtype in DTYPES[:3]
        if _taken(check, dtype)
    ],
)
def test_values(check, dtype):
    check(RUN, dtype, DEVICE)


def test_float64_runs_the_reference():
    checks.check_kinds(RUN, torch.float64, DEVICE)


@pytest.mark.parametrize("dtype, kind", [(torch.float32, FULL[0]), (torch.bfloat16, FULL[1])], ids=str)
def test_sizes(dtype, kind):
    """Several tiles, whole tiles, less than one; a row of one, and rows past what stays in registers."""
    for M, K in ((0, 3), (1, 1), (300, 3), (129, 16), (17, 33), (3, 384), (2, 4100), (1, 16_500)):
        check(RUN, data(M, K, dtype, DEVICE, kind))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check(RUN, data(9, 40, torch.bfloat16, DEVICE, FULL[0], layout))


def test_a_mean_far_from_zero():
    one = data(3, 600, torch.float32, DEVICE, Kind())
    check(RUN, replace(one, x=one.x + 1e4))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_nothing_is_written(layout):
    one = data(9, 70, torch.bfloat16, DEVICE, FULL[0], layout)
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    first, second = checks.outputs(RUN, one), checks.outputs(RUN, one)
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())


@pytest.fixture(params=["rows", "columns"])
def small_tiles(monkeypatch, request):
    """Spans of several chains and many parts, by rows and by columns; rows in several blocks."""
    plans = (triton_impl._forward_plan, triton_impl._backward_plan, triton_impl._terms_plan, columns._plan)

    def forget() -> None:
        for plan in plans:
            plan.cache_clear()

    def rows(M: int, K: int, sums: int) -> Tile:
        return Tile(2, pick_forward(K).block_k, 4, 2 * STEPS * 2)

    monkeypatch.setattr(triton_impl, "pick_backward", rows)
    monkeypatch.setattr(triton_impl, "pick_columns", lambda *_: Tile(4, 16, 4, 64))
    monkeypatch.setattr(columns, "pick_sum", lambda N: columns.SumTile(4, 16))
    if request.param == "columns":
        monkeypatch.setattr(triton_impl, "fits_forward", lambda K: False)
        monkeypatch.setattr(triton_impl, "fits_backward", lambda K, sums: False)
        monkeypatch.setattr(triton_impl, "pick_forward", lambda K: Tile(2, 16, 4))
        monkeypatch.setattr(triton_impl, "LOOP_BLOCK", 2048 if not interpreted.INTERPRETED else 16)
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_tiles(small_tiles, dtype):
    for M, K, kind in ((33, 16, FULL[0]), (65, 17, FULL[1]), (37, 40, Kind(weight=None, bias=None))):
        check(RUN, data(M, K, dtype, DEVICE, kind))


def test_a_long_sum_of_one_sign(small_tiles):
    """Many parts; the million rows of check_same_sign take minutes under the interpreter."""
    one = data(2000, 3, torch.float32, DEVICE, Kind(weight=None))
    given = given_statistics(one.x, one)
    dy, found = one.dy.abs(), checks.Statistics.given(*given)
    truth = checks.bounds_norm.backward(dy, None, one.x, found, None, False, torch.float32, torch.float32)
    sums = RUN.bwd(dy, None, one.x, *given, None, False, False, True, True, torch.float32, torch.float32)[1:]
    for name, out in zip(("dweight", "dbias"), sums, strict=True):
        checks.bounds.assert_within(out, *truth[name], name)
