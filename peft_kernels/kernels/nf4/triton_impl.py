"""nf4_quantize, nf4_quantize_scales and nf4_dequantize in Triton: the bits of the reference, one launch each."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.nf4 import FP4_BOUNDS, FP4_CODES, NESTED_BLOCKSIZE, NF4_BOUNDS
from .._shared import nf4
from .._shared.launch import Plan, cdiv, launch
from . import reference
from .configs import NUM_WARPS, SCALES_NUM_WARPS, blocks_per_program, scale_blocks_per_program

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_NF4_BOUNDS, _FP4_BOUNDS = tl.constexpr(NF4_BOUNDS), tl.constexpr(FP4_BOUNDS)
_FP4_CODES = tl.constexpr(sum(code << 4 * size for size, code in enumerate(FP4_CODES)))  # a nibble each
_NESTED = tl.constexpr(NESTED_BLOCKSIZE)


@triton.jit
def _absmax_and_scaled(blocks):
    """fp32 [rows, cols] -> the largest magnitude of each row, NaN if one is, and the blocks times its reciprocal."""
    # Magnitudes order as their bits do, and NaN comes after infinity: tl.max of floats would pass NaN by.
    bits = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    return absmax, blocks * tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax)[:, None]


@triton.jit
def _rank(values, BOUNDS: tl.constexpr, FIRST: tl.constexpr):
    """How many of the seven ascending bounds from FIRST on a value is above, in three comparisons; NaN is above all."""
    four = ~(values <= BOUNDS[FIRST + 3])
    two = ~(values <= tl.where(four, BOUNDS[FIRST + 5], BOUNDS[FIRST + 1]))
    upper = tl.where(two, BOUNDS[FIRST + 6], BOUNDS[FIRST + 4])
    one = ~(values <= tl.where(four, upper, tl.where(two, BOUNDS[FIRST + 2], BOUNDS[FIRST])))
    return tl.where(four, 4, 0) | tl.where(two, 2, 0) | tl.where(one, 1, 0)


@triton.jit
def _codes(scaled, FP4: tl.constexpr):
    """fp32 in [-1, 1] -> int32 codes; NaN, as 0 / 0 in a block of zeros, has the code of 0."""
    if FP4:
        size = _rank(tl.where(scaled != scaled, 0.0, tl.abs(scaled)), _FP4_BOUNDS, 0)
        codes = tl.full(size.shape, _FP4_CODES, tl.int32)
        return ((codes >> (4 * size)) & 15) | tl.where(scaled < 0, 8, 0)
    # NaN is not above the bound in the middle, and its rank below that, 7, is the code of 0.
    return tl.where(scaled > _NF4_BOUNDS[7], 8 | _rank(scaled, _NF4_BOUNDS, 8), _rank(scaled, _NF4_BOUNDS, 0))


@triton.jit
def _quantize_kernel(
    weight_ptr, packed_ptr, absmax_ptr,
    numel, packed_bytes, blocks,
    FP4: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of a contiguous weight; what is past its end counts as 0."""
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.load(weight_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
    absmax, scaled = _absmax_and_scaled(values)
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)
    high, low = tl.split(tl.reshape(_codes(scaled, FP4), (BLOCKS, HALF, 2)))
    offs_b = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + offs_b, (high << 4 | low).to(tl.uint8), mask=offs_b < packed_bytes)


@triton.jit
def _quantize_scales_kernel(
    absmax_ptr, code_ptr, offset_ptr, out_ptr, nested_absmax_ptr,
    count, blocks,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """8-bit codes of BLOCKS blocks of absmax - offset: eight steps of a search among the midpoints of nested_code."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs = block[:, None] * _NESTED + tl.arange(0, _NESTED)[None, :]
    inside = offs < count
    values = tl.where(inside, tl.load(absmax_ptr + offs, mask=inside, other=0.0) - tl.load(offset_ptr), 0.0)
    nested_absmax, scaled = _absmax_and_scaled(values)
    tl.store(nested_absmax_ptr + block, nested_absmax, mask=block < blocks)
    code = tl.zeros(offs.shape, dtype=tl.int32)
    for step in tl.static_range(8):
        below = code + ((128 >> step) - 1)
        middle = (tl.load(code_ptr + below + 1) + tl.load(code_ptr + below)) * 0.5
        # A value midway has the even code of the two; nothing is above where it is NaN, which has code 0.
        above = (scaled > middle) | ((scaled == middle) & (below % 2 == 1))
        code += tl.where(above, 128 >> step, 0)
    tl.store(out_ptr + offs, code.to(tl.uint8), mask=inside)


@lru_cache(maxsize=4096)
def _quantize_plan(blocks: int, quant_type: str, blocksize: int) -> Plan:
    each = blocks_per_program(blocksize)
    constants = {"FP4": quant_type == "fp4", "BLOCKSIZE": blocksize, "BLOCKS": each}
    return Plan((cdiv(blocks, each), 1, 1), constants, NUM_WARPS, 1)


@lru_cache(maxsize=4096)
def _scales_plan(blocks: int) -> Plan:
    each = scale_blocks_per_program(NESTED_BLOCKSIZE)
    return Plan((cdiv(blocks, each), 1, 1), {"BLOCKS": each}, SCALES_NUM_WARPS, 1)


def nf4_quantize(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Arguments and results of reference.nf4_quantize, which an empty weight runs on any device."""
    reference.check_quantize(weight, quant_type, blocksize)
    numel = weight.numel()
    if numel == 0:
        return reference.nf4_quantize(weight, quant_type, blocksize)
    blocks = cdiv(numel, blocksize)
    packed = weight.new_empty(cdiv(numel, 2), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.float32)
    plan = _quantize_plan(blocks, quant_type, blocksize)
    launch(_quantize_kernel, plan, (weight.contiguous(),), (packed, absmax), (numel, packed.shape[0], blocks))
    return packed, absmax


def nf4_quantize_workspace(weight: Tensor, quant_type: str, blocksize: int) -> int:
    """Bytes of temporaries that nf4_quantize holds: a weight that is not contiguous is copied."""
    return 0 if weight.is_contiguous() else weight.numel() * weight.element_size()


def nf4_quantize_scales(absmax: Tensor, nested_code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of reference.nf4_quantize_scales, which no scales run on any device."""
    reference.check_scales(absmax, nested_code)
    count = absmax.numel()
    if count == 0:
        return reference.nf4_quantize_scales(absmax, nested_code)
    blocks = cdiv(count, NESTED_BLOCKSIZE)
    offset = absmax.mean().view(1)  # its last bit is PyTorch's on this device, as the reference says
    codes, nested_absmax = absmax.new_empty(count, dtype=torch.uint8), absmax.new_empty(blocks)
    inputs, outputs = (absmax, nested_code, offset), (codes, nested_absmax)
    launch(_quantize_scales_kernel, _scales_plan(blocks), inputs, outputs, (count, blocks))
    return codes, nested_absmax, offset


def nf4_dequantize(*args) -> Tensor:
    """Arguments and result of reference.nf4_dequantize, which float64 and empty weights run on any device."""
    *weight, quant_type, blocksize, numel, dtype = args
    if dtype not in _DTYPES or numel == 0:
        return reference.nf4_dequantize(*args)
    reference.check_dequantize(*args)
    out = weight[0].new_empty((1, numel), dtype=dtype)
    return nf4.dequantize(weight, quant_type, blocksize, out).view(numel)
