"""The strength of the 4-bit formats' checks: each planted fault must turn one red, the unmutated maths none."""

from dataclasses import replace

import nf4_checks as checks
import pytest
import torch
from mutants_nf4 import QUANTIZE, SCALES
from mutants_nf4_values import DEQUANTIZE
from nf4_checks import REFERENCE, Ops

pytestmark = pytest.mark.usefixtures("poisoned")


def first_red(ops: Ops) -> str | None:
    """The first check that fails, with its message; None when all are green."""
    every = [(check, dtype) for check in checks.CHECKS for dtype in checks.IN_DTYPES]
    every += [(check, torch.float32) for check in checks.SCALE_CHECKS]
    every += [(check, dtype) for check in checks.VALUE_CHECKS for dtype in checks.OUT_DTYPES]
    for check, dtype in every:
        try:
            check(ops, dtype, "cpu")
        except (AssertionError, RuntimeError) as error:
            return f"{check.__name__} in {dtype}: {error}"
    return None


def test_unmutated_is_green():
    assert first_red(REFERENCE) is None


FAULTS = [
    *(("quantize", name, fault) for name, fault in QUANTIZE.items()),
    *(("quantize_scales", name, fault) for name, fault in SCALES.items()),
    *(("dequantize", name, fault) for name, fault in DEQUANTIZE.items()),
]


@pytest.mark.parametrize(("part", "fault"), [(part, fault) for part, _, fault in FAULTS], ids=[f[1] for f in FAULTS])
def test_fault_is_caught(part, fault):
    red = first_red(replace(REFERENCE, **{part: fault}))
    assert red is not None, f"{fault.__name__} passes every check"
    print(f"{fault.__name__}: {red}")
