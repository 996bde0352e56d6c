"""The C++ kernels of nf4 for every instruction set that is here: values, chunks, threads, stores past the caches."""

import nf4_checks as checks
import pytest
import torch
from nf4_checks import IN_DTYPES, OP, OUT_DTYPES, TYPES, quantized, weights
from nf4_truth import CODE

from peft_kernels._core import native

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(params=_C.available_isas() if _C else [])
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_quantize(isa, check, dtype):
    check(OP, dtype, "cpu")


@pytest.mark.parametrize("check", checks.SCALE_CHECKS, ids=lambda check: check.__name__)
def test_scales(isa, check):
    check(OP, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.VALUE_CHECKS, ids=lambda check: check.__name__)
def test_dequantize(isa, check, dtype):
    check(OP, dtype, "cpu")


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_what_goes_past_the_caches(isa, double_quant, dtype):
    """Outputs of 16 MiB in memory that was used before are stored another way, but for what fills no line."""
    numel = 2**24 // dtype.itemsize + 45
    tensors = quantized(numel, 64, double_quant, "cpu")
    for quant_type in TYPES:
        for _ in range(2):  # the second one finds the memory of the first
            checks.check_decoded(OP, tensors, quant_type, 64, numel, dtype)


def test_any_number_of_threads_gives_the_same_bits(isa):
    before, numel = torch.get_num_threads(), 300_001
    # Integers below 2^24 in all: PyTorch's mean, the offset, adds them without a rounding, by however many threads.
    scales = torch.randint(1, 20, (numel,)).float()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            packed, absmax = OP.quantize(weights(numel, torch.bfloat16, "cpu"), "nf4", 64)
            values = OP.dequantize(packed, absmax, None, None, None, "nf4", 64, numel, torch.bfloat16)
            codes, nested, _ = OP.quantize_scales(scales, CODE)
            found.append((packed, absmax, values, codes, nested))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], one, strict=True))
