"""The suite's own strength: each planted fault must turn a check red, the unmutated implementation none."""

from contextlib import nullcontext

import bounds
import checks
import mutants_backward  # noqa: F401  (registers its faults)
import mutants_forward  # noqa: F401
import pytest
import torch
from cases import Case, Implementation
from mutants import BWD, FWD, MUTANTS
from public_call import check_gradients

from peft_kernels.kernels.lora_linear import op

# Autograd casts a gradient to its leaf's dtype; a saved tensor that is overwritten after use shows in a second
# backward (test_retain_graph_gives_the_same_twice).
UNSEEN_IN_PUBLIC = ("gradients_of_the_adapters_in_the_wrong_dtype", "saved_s_overwritten")

pytestmark = pytest.mark.usefixtures("poisoned")


def _cases(dtype: torch.dtype) -> list[Case]:
    """A few of the kinds of value cases; every fault must be seen in each dtype, however wide its bounds are."""
    return [
        Case(37, 53, 71, 12, dtype),
        Case(37, 53, 71, 12, dtype, dropout=0.5, adapters=torch.float32),
        Case(37, 53, 71, 12, dtype, layout="transposed"),
        Case(1024, 3, 1024, 1, dtype, dropout=0.5),
        Case(4000, 5, 400, 3, dtype, positive=True),
    ]


def first_red(impl: Implementation, dtype: torch.dtype) -> str | None:
    """The first check that fails for `impl`, with its message; None when all are green."""
    runs = [(check, case) for case in _cases(dtype) for check in checks.CHECKS]
    runs += [(checks.check_repeats, _cases(dtype)[0])]
    for check, case in runs:
        try:
            with bounds.sums_in_one_chain() if case.positive else nullcontext():  # as test_long_sums_of_one_sign
                check(impl, case)
        except AssertionError as error:
            return f"{check.__name__}[{case}]: {error}"
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unmutated_is_green(dtype):
    assert first_red(Implementation("reference", "cpu", FWD, BWD), dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fault", MUTANTS)
def test_fault_is_caught(fault, dtype):
    red = first_red(MUTANTS[fault], dtype)
    assert red is not None, f"{fault} passes every check in {dtype}"
    print(f"{fault}: {red}")


def first_red_in_public(dtype: torch.dtype) -> str | None:
    """The first case in which the public function's output or a gradient is outside its bound."""
    for case in _cases(dtype):
        try:
            with bounds.sums_in_one_chain() if case.positive else nullcontext():
                check_gradients(case, "cpu")
        except AssertionError as error:
            return f"{case}: {error}"
    return None


def test_unmutated_is_green_in_public():
    assert first_red_in_public(torch.bfloat16) is None


@pytest.mark.parametrize("fault", [name for name in MUTANTS if name not in UNSEEN_IN_PUBLIC])
def test_fault_is_caught_in_public(fault, monkeypatch):
    """The same faults under autograd: what it passes to the backward is what the forward made."""
    monkeypatch.setattr(op, "lora_linear_fwd", MUTANTS[fault].fwd)
    monkeypatch.setattr(op, "lora_linear_bwd", MUTANTS[fault].bwd)
    assert first_red_in_public(torch.bfloat16) is not None, f"{fault} passes in public"
