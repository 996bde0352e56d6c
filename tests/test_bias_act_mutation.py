"""The strength of the activation pass's checks: each planted fault must turn one red, the unmutated reference none."""

import act_checks as checks
import pytest
import torch
from act_checks import ACTIVATIONS
from act_mutants import BACKWARD, FORWARD

from peft_kernels.kernels.bias_grad import activations

DTYPES = (torch.float32, torch.bfloat16)
QUICK_FIRST = sorted(checks.CHECKS, key=lambda check: check in (checks.check_layouts, checks.check_repeats))

pytestmark = pytest.mark.usefixtures("poisoned")


def first_red(run: checks.Run, activation: str, dtype: torch.dtype) -> str | None:
    """The first check that fails for `run`, with its message; None when all are green."""
    for check in QUICK_FIRST:
        try:
            check(run, activation, dtype, "cpu")
        except AssertionError as error:
            return f"{check.__name__}: {error}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_unmutated_is_green(activation, dtype):
    assert first_red(checks.run_of("reference"), activation, dtype) is None


UNSEEN = {
    # In fp32 products are summed as they are stored; what ReLU lets pass needs no rounding in any dtype.
    "rounded_products_summed": lambda activation, dtype: activation == "relu" or dtype == torch.float32,
    "dz_cut_instead_of_rounded": lambda activation, dtype: activation == "relu",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("planted", "activation"), [(name, a) for name, (_, touched) in BACKWARD.items() for a in touched]
)
def test_fault_of_the_backward_is_caught(planted, activation, dtype):
    if planted in UNSEEN and UNSEEN[planted](activation, dtype):
        pytest.skip("the same as the reference here")
    red = first_red(checks.Run(activations.relu_fwd, BACKWARD[planted][0]), activation, dtype)
    assert red is not None, f"{planted} passes every check of {activation} in {dtype}"
    print(f"{planted}: {red}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("planted", FORWARD)
def test_fault_of_the_forward_is_caught(planted, dtype):
    red = first_red(checks.Run(FORWARD[planted], activations.act_bwd), "relu", dtype)
    assert red is not None, f"{planted} passes every check in {dtype}"
    print(f"{planted}: {red}")
