"""Quantising to 4 bits and back by the CUDA kernels, run on a CPU: bit for bit what formats/nf4_values.py says."""

import ctypes

import pytest
import torch
from cuda_host import nf4
from cuda_host.build import CXX, library
from cuda_host.memory import at, memory
from nf4_host_checks import (
    SIZES,
    TYPES,
    any_weight,
    check_dequantize,
    check_dequantize_part,
    check_quantize,
    check_scales,
    check_ties,
    weights,
)

from peft_kernels.formats.nf4 import BLOCKSIZES, nested_code

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


@pytest.fixture(scope="module")
def dequantizer(cache):
    return library(cache, nf4.DEQUANTIZE)


@pytest.fixture(scope="module")
def quantizer(cache):
    return library(cache, nf4.QUANTIZE)


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize(dequantizer, blocksize, nested, dtype):
    for numel in (*SIZES, 20_005):
        quant_type = TYPES[numel % 2]
        check_dequantize(dequantizer, numel, quant_type, blocksize, nested, dtype, keep=numel % 3 == 0)
        check_dequantize(dequantizer, numel, quant_type, blocksize, nested, dtype, aligned=False)


def test_dequantize_many_nested_blocks(dequantizer):
    check_dequantize(dequantizer, 40_003, "nf4", 32, True, torch.bfloat16)
    check_dequantize(dequantizer, 40_000, "fp4", 64, True, torch.float32)


COLUMNS = [
    (0, 80, 70, 8),
    (8, 80, 70, 72),
    (16, 272, 33, 256),
    (0, 520, 9, 264),
    (24, 2072, 5, 2048),
    (48, 4096, 17, 512),
]
"""start, pitch, rows, cols: one piece and more than a warp's in a row, whole tiles and tails both ways."""


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantize_a_part(dequantizer, blocksize, nested, dtype):
    """Columns of a matrix, and rows: from anywhere in a block of scales, to its last element, an odd number of them."""
    for part in COLUMNS:
        numel = part[0] + part[1] * (part[2] - 1) + part[3] + part[2] % 3
        check_dequantize_part(dequantizer, numel, blocksize, nested, dtype, part)
        check_dequantize_part(dequantizer, numel, blocksize, nested, dtype, part, aligned=False)
    for start, cols in ((8, 1), (40, 4097), (4096, 904), (16, 20_000), (9008, 7)):
        check_dequantize_part(dequantizer, 20_016, blocksize, nested, dtype, (start, 0, 1, cols))


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize(quantizer, blocksize, quant_type, dtype):
    for numel in (*SIZES, 20_005):
        values = weights(numel, dtype, blocksize, quant_type)
        check_quantize(quantizer, values, quant_type, blocksize)
        check_quantize(quantizer, values, quant_type, blocksize, aligned=False)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_quantize_what_is_extreme(quantizer, blocksize, quant_type):
    """NaN and infinities reach absmax; 1 / absmax overflows; the largest and the smallest numbers."""
    tiny = 2.0**-149
    for special in (torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, -3e38, tiny, -tiny, 2.0**-128, -(2.0**-129)):
        for at_element in (0, 5, blocksize - 1, blocksize + 3):
            values = torch.zeros(2 * blocksize + 7)
            values[at_element] = special
            check_quantize(quantizer, values, quant_type, blocksize)


def test_every_16_bit_number_as_a_scale(quantizer):
    """Each positive float16 and bfloat16 as absmax of a block, of which an element is half of it."""
    for dtype in (torch.float16, torch.bfloat16):
        scales = torch.arange(1, 0x7C00, 7, dtype=torch.int16).view(dtype)
        values = torch.zeros(len(scales), 32, dtype=dtype)
        values[:, 3], values[:, 4], values[:, 17] = scales, scales / 2, -scales / 3
        check_quantize(quantizer, values.flatten(), "nf4", 32)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 1003])
def test_quantize_scales(quantizer, blocks):
    generator = torch.Generator().manual_seed(blocks)
    absmax = torch.randn(blocks, generator=generator).exp()
    check_scales(quantizer, absmax, nested_code())
    check_scales(quantizer, torch.full((blocks,), 0.7), nested_code())
    check_scales(quantizer, absmax, torch.linspace(-1, 1, 256))


def test_ties_of_scales(quantizer):
    check_ties(quantizer, nested_code())
    check_ties(quantizer, torch.linspace(-1, 1, 256))


@pytest.mark.parametrize(("field", "value"), [
    ("numel", -1), ("blocksize", 48), ("blocksize", 16), ("blocksize", 8192), ("packed", None), ("absmax", None),
    ("dtype", 3), ("start", -8), ("start", 4), ("start", 8), ("rows", -1), ("rows", 3), ("cols", -1), ("cols", 65),
    ("pitch", -8), ("out", None),
])  # fmt: skip
def test_wrong_calls(dequantizer, field, value):
    with memory(dequantizer) as device:
        weight = nf4.put_weight(device, any_weight(64, "nf4", 64, False), "nf4", 64, 64)
        out = device.empty((64,), torch.bfloat16)
        args = nf4.Dequantize(weight, at(out).value, 0, 32, 1, 64, 0, 0)
        setattr(args.weight if hasattr(weight, field) else args, field, value)
        assert dequantizer.nf4_dequantize_cuda(ctypes.byref(args), None) == 1


def test_wrong_quantize_calls(quantizer):
    with memory(quantizer) as device:
        given = at(device.put(torch.ones(64))).value
        out = at(device.empty((64,), torch.float32)).value
        good = dict(weight=given, packed=out, absmax=out, numel=64, blocksize=64, dtype=2)
        for wrong in ({"numel": -1}, {"blocksize": 96}, {"dtype": 3}, {"weight": None}, {"packed": None}):
            args = nf4.Quantize(**{**good, **wrong})
            assert quantizer.nf4_quantize_cuda(ctypes.byref(args), None) == 1, wrong
        assert quantizer.nf4_quantize_cuda(ctypes.byref(nf4.Quantize(blocksize=64)), None) == 0, "nothing to do"
        assert quantizer.nf4_quantize_scales_cuda(ctypes.byref(nf4.QuantizeScales(blocks=1)), None) == 1
        assert quantizer.nf4_quantize_scales_cuda(ctypes.byref(nf4.QuantizeScales()), None) == 0, "nothing to do"
