"""The strength of norm's checks: each planted fault must turn one red, the unmutated maths none."""

import norm_checks as checks
import pytest
import torch
from mutants_norm_backward import BACKWARD, bwd
from mutants_norm_forward import FORWARD, fwd
from norm_cases import DTYPES, Run

from peft_kernels.kernels.norm import reference

pytestmark = pytest.mark.usefixtures("poisoned")


def first_red(run: Run, dtype: torch.dtype) -> str | None:
    """The first check that fails for `run`, with its message; None when all are green."""
    for check in (*checks.CHECKS, checks.check_same_sign):
        try:
            check(run, dtype, "cpu")
        except AssertionError as error:
            return f"{check.__name__}: {error}"
    return None


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_unmutated_is_green(dtype):
    assert first_red(Run(fwd, bwd), dtype) is None


# In fp32 there is no narrower dtype that a step could wrongly be rounded to.
SAME_IN_FP32 = {
    "statistics_of_the_unrounded_total",
    "y_of_the_unrounded_total",
    "y_rounded_to_xs_dtype_when_asked_for_fp32",
    "xhat_rounded_before_the_weight",
    "a_wide_dy_rounded_to_xs_dtype (backward)",
}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("fault", [*FORWARD, *(f"{name} (backward)" for name in BACKWARD)])
def test_fault_is_caught(fault, dtype):
    if dtype == torch.float32 and fault in SAME_IN_FP32:
        pytest.skip("the same as the reference in this dtype")
    if fault in FORWARD:
        run = Run(FORWARD[fault], reference.norm_bwd)
    else:
        run = Run(reference.norm_fwd, BACKWARD[fault.removesuffix(" (backward)")])
    red = first_red(run, dtype)
    assert red is not None, f"{fault} passes every check in {dtype}"
    print(f"{fault}: {red}")
