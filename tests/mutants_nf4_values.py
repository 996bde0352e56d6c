"""Faults planted in dequantising 4-bit weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from peft_kernels.formats import nf4, nf4_values
from peft_kernels.kernels.nf4 import reference

DEQUANTIZE: dict[str, Callable] = {}


def _fault(fault: Callable) -> Callable:
    DEQUANTIZE[fault.__name__] = fault
    return fault


def _values(
    packed, absmax, nested_absmax, code, offset, quant_type, blocksize, numel, dtype, scale=None, product=None, shift=0
) -> Tensor:
    """The reference, with faults in place of the scales, of the last product or of the block of an element."""
    found = (scale or nf4_values.scales)(absmax, nested_absmax, code, offset)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[:numel]
    level = torch.tensor(nf4.LEVELS[quant_type], dtype=torch.float32)[codes.int()]
    scale = found[((torch.arange(numel) + shift) // blocksize).clamp(0, max(0, found.numel() - 1))]
    return (level * scale).to(dtype) if product is None else product(level, scale, dtype)


def _contracted(absmax, nested_absmax, code, offset) -> Tensor:
    """What a fused multiply-add gives: one rounding."""
    if nested_absmax is None:
        return absmax
    block = torch.arange(absmax.numel()) // 256
    return (code.double()[absmax.int()] * nested_absmax.double()[block] + offset.double()).float()


@_fault
def scales_by_a_fused_multiply_add(*args):
    return _values(*args, scale=_contracted)


@_fault
def one_nested_scale_for_all(*args):
    def scale(absmax, nested_absmax, code, offset):
        if nested_absmax is None:
            return absmax
        return nf4_values.scales(absmax, nested_absmax[:1].expand(nested_absmax.shape), code, offset)

    return _values(*args, scale=scale)


@_fault
def the_offset_dropped(*args):
    def scale(absmax, nested_absmax, code, offset):
        return nf4_values.scales(absmax, nested_absmax, code, None if offset is None else torch.zeros_like(offset))

    return _values(*args, scale=scale)


@_fault
def subnormal_scales_taken_for_zero(*args):
    def scale(*tensors):
        found = nf4_values.scales(*tensors)
        return torch.where(found.abs() < 2.0**-126, 0.0, found)

    return _values(*args, scale=scale)


@_fault
def subnormal_values_taken_for_zero(*args):
    """What the instruction that rounds to bf16 does."""

    def product(level, scale, dtype):
        value = level * scale
        return torch.where(value.abs() < 2.0**-126, 0.0, value).to(dtype)

    return _values(*args, product=product)


@_fault
def the_level_rounded_first(*args):
    return _values(*args, product=lambda level, scale, dtype: (level.bfloat16().float() * scale).to(dtype))


@_fault
def the_scale_rounded_first(*args):
    return _values(*args, product=lambda level, scale, dtype: (level * scale.bfloat16().float()).to(dtype))


@_fault
def rounded_towards_zero(*args):
    def product(level, scale, dtype):
        value = level * scale
        cut = {torch.bfloat16: 0xFFFF, torch.float16: 0x1FFF}.get(dtype, 0)
        return (value.view(torch.int32) & ~cut).view(torch.float32).to(dtype)

    return _values(*args, product=product)


@_fault
def products_in_fp64(*args):
    return _values(*args, product=lambda level, scale, dtype: (level.double() * scale.double()).to(dtype))


@_fault
def the_next_element_s_block(*args):
    return _values(*args, shift=1)


@_fault
def blocks_by_the_largest_size(*args):
    return _values(*args[:6], max(64, args[6]), *args[7:])


@_fault
def halves_swapped(packed, *args):
    return reference.nf4_dequantize(packed >> 4 | packed << 4, *args)


@_fault
def the_levels_of_the_other_type(*args):
    return reference.nf4_dequantize(*args[:5], "nf4", *args[6:])


@_fault
def fp4_without_the_negative_zero(*args):
    return reference.nf4_dequantize(*args) + 0.0


@_fault
def the_last_element_not_written(*args):
    values = reference.nf4_dequantize(*args)
    values[-1:] = torch.nan
    return values


@_fault
def the_last_odd_element_from_the_other_half(packed, *args):
    values = reference.nf4_dequantize(packed, *args)
    if args[6] % 2:
        values[-1:] = reference.nf4_dequantize(packed >> 4 | packed << 4, *args)[-1:]
    return values


@_fault
def always_in_fp32(*args):
    return reference.nf4_dequantize(*args[:8], torch.float32)
