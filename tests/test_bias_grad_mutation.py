"""The strength of bias_grad's checks: each planted fault must turn one red, the unmutated reference none."""

from collections.abc import Callable

import bias_grad_checks as checks
import pytest
import torch

from peft_kernels.kernels.bias_grad import reference

DTYPES = checks.DTYPES[:3]
MUTANTS: dict[str, Callable] = {}

pytestmark = pytest.mark.usefixtures("poisoned")


def mutant(fault: Callable) -> Callable:
    MUTANTS[fault.__name__] = fault
    return fault


def _sum(dy, dtype):
    return reference.bias_grad(dy, dtype)


@mutant
def the_tail_of_rows_dropped(dy, dtype):
    return _sum(dy[: len(dy) // 16 * 16] if len(dy) > 16 else dy, dtype)


@mutant
def the_last_row_dropped(dy, dtype):
    return _sum(dy[:-1], dtype)


@mutant
def a_row_counted_twice(dy, dtype):
    return _sum(torch.cat([dy, dy[:1]]), dtype)


@mutant
def the_last_column_not_written(dy, dtype):
    out = torch.empty(dy.shape[1], dtype=dtype)
    out[:-1] = _sum(dy, dtype)[:-1]
    return out


@mutant
def the_last_vector_shifted(dy, dtype):
    """Columns past the last multiple of eight, taken from one column further left."""
    tail = dy.shape[1] % 8
    shifted = torch.cat([dy[:, : dy.shape[1] - tail], dy[:, dy.shape[1] - tail - 1 : -1]], 1) if tail else dy
    return _sum(shifted if dy.shape[1] > 8 else dy, dtype)


@mutant
def even_and_odd_columns_swapped(dy, dtype):
    even = dy.shape[1] // 2 * 2
    swapped = dy[:, :even].unflatten(1, (-1, 2)).flip(2).flatten(1) if even else dy[:, :0]
    return _sum(torch.cat([swapped, dy[:, even:]], 1), dtype)


@mutant
def strides_ignored(dy, dtype):
    span = (dy.shape[0] - 1) * dy.shape[1] + dy.shape[1]
    inside = span <= dy.untyped_storage().nbytes() // dy.element_size() - dy.storage_offset()
    return _sum(dy.as_strided(dy.shape, (dy.shape[1], 1)) if inside else dy, dtype)


@mutant
def a_row_stride_of_zero_taken_for_one_row(dy, dtype):
    return _sum(dy[:1] if dy.stride(0) == 0 else dy, dtype)


@mutant
def the_mean(dy, dtype):
    return _sum(dy, dtype) / max(1, len(dy))


@mutant
def scaled(dy, dtype):
    return _sum(dy, torch.float32).mul(1 + 2.0**-6).to(dtype)


@mutant
def one_long_chain_in_fp32(dy, dtype):
    """What is left when the second level of the sum is no wider than the first."""
    blocks = [block.float().sum(0) for block in dy.split(16 if len(dy) < 10_000 else 64)]
    total = torch.zeros(dy.shape[1])
    for block in blocks:
        total = total + block
    return total.to(dtype)


@mutant
def an_accumulator_in_bf16(dy, dtype):
    total = torch.zeros(dy.shape[1])
    for block in dy.split(max(16, len(dy) // 100)):
        total = (total + block.float().sum(0)).bfloat16().float()
    return total.to(dtype)


@mutant
def the_fp32_gradient_rounded_to_bf16(dy, dtype):
    return _sum(dy, dtype).bfloat16().to(dtype)


@mutant
def always_in_fp32(dy, dtype):
    return _sum(dy, torch.float32)


@mutant
def nothing_written_for_no_rows(dy, dtype):
    return _sum(dy, dtype) if len(dy) else torch.empty(dy.shape[1], dtype=dtype)


@mutant
def compensation_that_turns_inf_into_nan(dy, dtype):
    total = _sum(dy, torch.float32)
    return (total + (total - total)).to(dtype)


@mutant
def infinities_cut_off(dy, dtype):
    return _sum(dy, dtype).nan_to_num(nan=0.0)


@mutant
def another_order_each_time(dy, dtype):
    total = torch.zeros(dy.shape[1])
    for row in torch.randperm(len(dy)).split(40):
        total = total + dy[row].float().sum(0)
    return total.to(dtype)


@mutant
def offsets_of_32_bits(dy, dtype):
    """What lies past 2**31 elements is taken from where the offset wraps to."""
    far = [i for i in range(dy.shape[0]) if i * dy.stride(0) >= 2**31] if dy.stride(0) else []
    return _sum(dy if not far else torch.cat([dy[: far[0]], dy[: len(far)]]), dtype)


def first_red(run: Callable, dtype: torch.dtype) -> str | None:
    """The first check that fails for `run`, with its message; None when all are green."""
    for check in (*checks.CHECKS, checks.check_far, checks.check_same_sign):
        try:
            check(run, dtype, "cpu")
        except AssertionError as error:
            return f"{check.__name__}: {error}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmutated_is_green(dtype):
    assert first_red(_sum, dtype) is None


# In fp32 the output has no narrower dtype that it could lack.
UNSEEN = {("always_in_fp32", torch.float32)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", MUTANTS)
def test_fault_is_caught(fault, dtype):
    if (fault, dtype) in UNSEEN:
        pytest.skip("the same as the reference in this dtype")
    red = first_red(MUTANTS[fault], dtype)
    assert red is not None, f"{fault} passes every check in {dtype}"
    print(f"{fault}: {red}")
