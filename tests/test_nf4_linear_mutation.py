"""The strength of nf4_linear's checks: each planted fault must turn one red, the unmutated maths none."""

from functools import partial

import nf4_linear_checks as checks
import pytest
import torch
from mutants_nf4_linear import PRODUCTS, WEIGHTS, runs
from nf4_linear_checks import Runs

DTYPES = checks.DTYPES[:3]

pytestmark = pytest.mark.usefixtures("poisoned")


def first_red(one: Runs, dtype: torch.dtype) -> str | None:
    """The first check that fails, with its message; None when all are green."""
    for check in checks.CHECKS:
        try:
            check(one, dtype, "cpu")
        except AssertionError as error:
            return f"{check.__name__}: {error}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmutated_is_green(dtype):
    assert first_red(runs(), dtype) is None


# In bf16 nothing is narrower than the dtype itself, and W is rounded to as many bits anyway.
UNSEEN = {
    ("added_after_the_rounding_of_a_narrow_sum", torch.bfloat16): "one more rounding, where all of W has one",
    ("fp16_by_way_of_bf16", torch.bfloat16): "the same as the reference in this dtype",
    ("scales_rounded_to_bf16", torch.bfloat16): "one more rounding of W of the size that is allowed",
    ("one_chain_in_fp32", torch.bfloat16): "what an fp32 chain loses is below a rounding to bf16",
    ("one_chain_in_fp32", torch.float16): "what an fp32 chain loses is below a rounding to fp16",
}

_FAULTS = {name: partial(runs, weight=fault) for name, fault in WEIGHTS.items()}
_FAULTS |= {name: partial(runs, product=fault) for name, fault in PRODUCTS.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", _FAULTS)
def test_fault_is_caught(fault, dtype):
    if (fault, dtype) in UNSEEN:
        pytest.skip(UNSEEN[fault, dtype])
    red = first_red(_FAULTS[fault](), dtype)
    assert red is not None, f"{fault} passes every check in {dtype}"
    print(f"{fault}: {red}")
