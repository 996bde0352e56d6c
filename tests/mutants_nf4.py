"""Faults planted in quantising to 4 bits, and scales to 8."""

from collections.abc import Callable

import torch
from torch import Tensor

from peft_kernels.formats import nf4, nf4_values
from peft_kernels.kernels.nf4 import reference

QUANTIZE: dict[str, Callable] = {}
SCALES: dict[str, Callable] = {}


def _into(table: dict[str, Callable]) -> Callable:
    def add(fault: Callable) -> Callable:
        table[fault.__name__] = fault
        return fault

    return add


def _blocks(weight: Tensor, blocksize: int) -> Tensor:
    flat = weight.flatten().float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def _packed(scaled: Tensor, numel: int, quant_type: str, bounds=nf4.NF4_BOUNDS, right: bool = False) -> Tensor:
    if quant_type == "nf4":
        codes = torch.bucketize(scaled, torch.tensor(bounds), right=right)
    else:
        codes = nf4_values._fp4_codes(scaled)
    codes = codes.to(torch.uint8).flatten()[: numel + numel % 2]
    return codes[::2] << 4 | codes[1::2]


def _quantize(weight, quant_type, blocksize, absmax=None, scaled=None, **more) -> tuple[Tensor, Tensor]:
    """The reference, with faults in place of a block's absmax, of the scaled elements or of the bounds."""
    blocks = _blocks(weight, blocksize)
    most = blocks.abs().amax(1) if absmax is None else absmax(blocks)
    values = blocks * (1 / most)[:, None] if scaled is None else scaled(blocks, most[:, None])
    values = torch.where(values.isnan(), 0.0, values)
    return _packed(values, weight.numel(), quant_type, **more), most


@_into(QUANTIZE)
def divided_by_absmax(weight, quant_type, blocksize):
    return _quantize(weight, quant_type, blocksize, scaled=lambda blocks, most: blocks / most)


@_into(QUANTIZE)
def divided_in_the_last_block(weight, quant_type, blocksize):
    def scaled(blocks, most):
        return torch.cat([blocks[:-1] * (1 / most[:-1]), blocks[-1:] / most[-1:]])

    return _quantize(weight, quant_type, blocksize, scaled=scaled)


@_into(QUANTIZE)
def an_approximate_reciprocal(weight, quant_type, blocksize):
    def scaled(blocks, most):
        return blocks * (1 / most).view(torch.int32).add(1).view(torch.float32)

    return _quantize(weight, quant_type, blocksize, scaled=scaled)


@_into(QUANTIZE)
def absmax_clamped_away_from_zero(weight, quant_type, blocksize):
    return _quantize(weight, quant_type, blocksize, absmax=lambda blocks: blocks.abs().amax(1).clamp(min=1e-38))


@_into(QUANTIZE)
def small_absmax_taken_for_zero(weight, quant_type, blocksize):
    def scaled(blocks, most):
        return torch.where(most < 2.0**-126, 0.0, blocks * (1 / most))

    return _quantize(weight, quant_type, blocksize, scaled=scaled)


@_into(QUANTIZE)
def the_largest_not_the_largest_magnitude(weight, quant_type, blocksize):
    return _quantize(weight, quant_type, blocksize, absmax=lambda blocks: blocks.amax(1).abs())


@_into(QUANTIZE)
def nan_passed_over(weight, quant_type, blocksize):
    return _quantize(weight, quant_type, blocksize, absmax=lambda blocks: blocks.nan_to_num(nan=0.0).abs().amax(1))


@_into(QUANTIZE)
def the_end_of_a_block_passed_over(weight, quant_type, blocksize):
    return _quantize(weight, quant_type, blocksize, absmax=lambda blocks: blocks[:, :-1].abs().amax(1))


@_into(QUANTIZE)
def a_value_on_a_bound_goes_up(weight, quant_type, blocksize):
    return _quantize(weight, quant_type, blocksize, right=True)


@_into(QUANTIZE)
def bounds_that_are_the_middles_in_fp32(weight, quant_type, blocksize):
    level = torch.tensor(nf4.NF4_LEVELS)
    return _quantize(weight, quant_type, blocksize, bounds=((level[1:] + level[:-1]) / 2).tolist())


@_into(QUANTIZE)
def bounds_one_ulp_off(weight, quant_type, blocksize):
    moved = torch.nextafter(torch.tensor(nf4.NF4_BOUNDS), torch.tensor(2.0)).tolist()
    return _quantize(weight, quant_type, blocksize, bounds=[*nf4.NF4_BOUNDS[:9], moved[9], *nf4.NF4_BOUNDS[10:]])


@_into(QUANTIZE)
def zero_where_the_reciprocal_is_infinite_is_code_0(weight, quant_type, blocksize):
    packed, absmax = reference.nf4_quantize(weight, quant_type, blocksize)
    zero = (absmax == 0).repeat_interleave(blocksize // 2)[: packed.numel()]
    return torch.where(zero & (quant_type == "nf4"), 0, packed).to(torch.uint8), absmax


@_into(QUANTIZE)
def halves_swapped(weight, quant_type, blocksize):
    packed, absmax = reference.nf4_quantize(weight, quant_type, blocksize)
    return packed >> 4 | packed << 4, absmax


@_into(QUANTIZE)
def the_last_half_byte_left_zero(weight, quant_type, blocksize):
    packed, absmax = reference.nf4_quantize(weight, "nf4" if quant_type == "nf4" else "fp4", blocksize)
    if weight.numel() % 2:
        packed[-1] &= 0xF0
    return packed, absmax


@_into(QUANTIZE)
def fp4_without_its_sign(weight, quant_type, blocksize):
    return reference.nf4_quantize(weight if quant_type == "nf4" else weight.abs(), quant_type, blocksize)


@_into(QUANTIZE)
def fp4_with_a_negative_zero(weight, quant_type, blocksize):
    packed, absmax = reference.nf4_quantize(weight, quant_type, blocksize)
    if quant_type == "fp4":
        scaled = _blocks(weight, blocksize) * (1 / absmax)[:, None]
        codes = nf4_values._fp4_codes(torch.where(scaled.isnan(), 0.0, scaled)) | scaled.signbit() * 8
        codes = codes.to(torch.uint8).flatten()[: weight.numel() + weight.numel() % 2]
        packed = codes[::2] << 4 | codes[1::2]
    return packed, absmax


@_into(QUANTIZE)
def strides_ignored(weight, quant_type, blocksize):
    inside = weight.numel() + weight.storage_offset() <= weight.untyped_storage().nbytes() // weight.element_size()
    memory = weight.as_strided((weight.numel(),), (1,)) if inside else weight
    return reference.nf4_quantize(memory.reshape(weight.shape), quant_type, blocksize)


@_into(QUANTIZE)
def blocks_of_rows(weight, quant_type, blocksize):
    """A row begins a block of its own: too many of them where K is no multiple."""
    if weight.dim() != 2 or weight.shape[1] % blocksize == 0:
        return reference.nf4_quantize(weight, quant_type, blocksize)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % blocksize))
    packed, absmax = reference.nf4_quantize(padded, quant_type, blocksize)
    return packed[: (weight.numel() + 1) // 2], absmax[: -(-weight.numel() // blocksize)]


def _scales(absmax, code, offset=None, bounds=None, nan=0) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean() if offset is None else offset
    blocks = _blocks(absmax - offset, 256)
    most = blocks.abs().amax(1)
    scaled = blocks * (1 / most)[:, None]
    bounds = nf4_values._nested_bounds(tuple(code.tolist())) if bounds is None else bounds
    codes = torch.where(scaled.isnan(), nan, torch.bucketize(scaled, bounds))
    return codes.flatten()[: absmax.numel()].to(torch.uint8), most, offset.view(1)


@_into(SCALES)
def without_the_offset(absmax, code):
    return _scales(absmax, code, offset=absmax.new_zeros(()))


@_into(SCALES)
def an_offset_in_fp64(absmax, code):
    return _scales(absmax, code, offset=absmax.double().mean().float())


@_into(SCALES)
def ties_go_down(absmax, code):
    return _scales(absmax, code, bounds=(code[1:] + code[:-1]) * 0.5)


@_into(SCALES)
def ties_go_to_the_odd_code(absmax, code):
    middle = (code[1:] + code[:-1]) * 0.5
    below = torch.nextafter(middle, torch.tensor(-9.0))
    return _scales(absmax, code, bounds=torch.where(torch.arange(255) % 2 == 1, middle, below))


@_into(SCALES)
def the_middle_code_for_equal_scales(absmax, code):
    return _scales(absmax, code, nan=127)


@_into(SCALES)
def one_block_of_scales(absmax, code):
    codes, most, offset = _scales(absmax, code)
    return codes, most.amax().expand_as(most).contiguous(), offset
