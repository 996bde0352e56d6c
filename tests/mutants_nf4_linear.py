"""What nf4_linear's planted faults are: the weight's values with one thing wrong, or the product."""

from collections.abc import Callable

import numpy as np
import torch
from nf4_linear_checks import Runs

from peft_kernels.formats import nf4_values
from peft_kernels.formats.nf4 import LEVELS

WEIGHTS: dict[str, Callable] = {}
PRODUCTS: dict[str, Callable] = {}


def weight_fault(fault: Callable) -> Callable:
    """`fault(tensors, quant_type, blocksize, shape)` -> the wrong fp32 W [N, K]."""
    WEIGHTS[fault.__name__] = fault
    return fault


def product_fault(fault: Callable) -> Callable:
    """`fault(left, right, rest)`: left [M, D] and right [D, J], `rest` what is added or None -> [M, J]."""
    PRODUCTS[fault.__name__] = fault
    return fault


def exact_weight(tensors, quant_type, blocksize, shape):
    return nf4_values.dequantize(*tensors, quant_type, blocksize, shape[0] * shape[1], torch.float32).view(shape)


def exact_product(left, right, rest):
    wide = torch.float64
    total = left.to(wide) @ right.to(wide)
    return (total if rest is None else total + rest).to(left.dtype)


def runs(weight: Callable = exact_weight, product: Callable = exact_product) -> Runs:
    def values(tensors, quant_type, blocksize, shape, dtype):
        return weight(tensors, quant_type, blocksize, shape).to(dtype)

    def fwd(x, *args):
        *tensors, bias, addend, quant_type, blocksize, N = args
        W = values(tensors, quant_type, blocksize, (N, x.shape[1]), x.dtype)
        rest = [t.double() for t in (bias, addend) if t is not None]
        return product(x, W.t(), sum(rest) if rest else None)

    def bwd(dy, *args):
        *tensors, addend, quant_type, blocksize, K = args
        W = values(tensors, quant_type, blocksize, (dy.shape[1], K), dy.dtype)
        return product(dy, W, None if addend is None else addend.double())

    return Runs(fwd, bwd)


def _with(tensors, **changed):
    names = "packed", "absmax", "nested_absmax", "nested_code", "nested_offset"
    return [changed.get(name, tensor) for name, tensor in zip(names, tensors, strict=True)]


@weight_fault
def halves_of_a_byte_swapped(tensors, *rest):
    return exact_weight(_with(tensors, packed=tensors[0] << 4 | tensors[0] >> 4), *rest)


@weight_fault
def the_scale_dropped(tensors, quant_type, blocksize, shape):
    scale = nf4_values.scales(*tensors[1:])
    return exact_weight([tensors[0], torch.ones_like(scale), None, None, None], quant_type, blocksize, shape)


@weight_fault
def the_scale_of_the_next_block(tensors, *rest):
    return exact_weight(_with(tensors, absmax=tensors[1].roll(-1)), *rest)


@weight_fault
def scales_by_row(tensors, quant_type, blocksize, shape):
    """A row's blocks begin at its start, as if no block crossed rows."""
    scale, per_row = nf4_values.scales(*tensors[1:]), shape[1] // blocksize
    row, column = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None]
    index = (row * per_row + column // blocksize).clamp(max=max(0, scale.numel() - 1))
    ones = [tensors[0], torch.ones_like(scale), None, None, None]
    return exact_weight(ones, quant_type, blocksize, shape) * scale[index] if scale.numel() else torch.zeros(shape)


@weight_fault
def scales_rounded_to_bf16(tensors, *rest):
    scale = nf4_values.scales(*tensors[1:]).bfloat16().float()
    return exact_weight([tensors[0], scale, None, None, None], *rest)


@weight_fault
def the_offset_of_the_scales_dropped(tensors, *rest):
    none = None if tensors[4] is None else torch.zeros_like(tensors[4])
    return exact_weight(_with(tensors, nested_offset=none), *rest)


@weight_fault
def the_first_second_level_scale_for_all(tensors, *rest):
    first = None if tensors[2] is None else tensors[2][:1].expand(tensors[2].numel())
    return exact_weight(_with(tensors, nested_absmax=first), *rest)


@weight_fault
def nf4_read_as_fp4(tensors, quant_type, *rest):
    return exact_weight(tensors, "fp4", *rest)


@weight_fault
def fp4_read_as_nf4(tensors, quant_type, *rest):
    return exact_weight(tensors, "nf4", *rest)


@weight_fault
def code_7_taken_for_8(tensors, quant_type, blocksize, shape):
    W = exact_weight(tensors, quant_type, blocksize, shape)
    codes = torch.stack([tensors[0] >> 4, tensors[0] & 15], -1).flatten()[: W.numel()].view(shape)
    return torch.where(codes == 7, W + (LEVELS["nf4"][8] if quant_type == "nf4" else 0.25), W)


@weight_fault
def levels_of_seven_bits(tensors, *rest):
    W = exact_weight(tensors, *rest)
    mantissa, exponent = torch.frexp(W)
    return torch.ldexp((mantissa * 128).round() / 128, exponent)


@weight_fault
def the_last_element_of_an_odd_row_dropped(tensors, quant_type, blocksize, shape):
    W = exact_weight(tensors, quant_type, blocksize, shape)
    return torch.cat([W[:, :-1], torch.zeros_like(W[:, -1:])], 1) if shape[1] % 2 else W


@weight_fault
def the_last_row_of_w_dropped(tensors, quant_type, blocksize, shape):
    W = exact_weight(tensors, quant_type, blocksize, shape)
    return torch.cat([W[:-1], torch.zeros_like(W[-1:])])


@product_fault
def the_tail_of_the_sum_dropped(left, right, rest):
    whole = left.shape[1] // 64 * 64 or left.shape[1]
    return exact_product(left[:, :whole], right[:whole], rest)


@product_fault
def what_is_added_dropped(left, right, rest):
    return exact_product(left, right, None)


@product_fault
def added_twice(left, right, rest):
    return exact_product(left, right, None if rest is None else 2 * rest)


@product_fault
def added_after_the_rounding_of_a_narrow_sum(left, right, rest):
    total = exact_product(left, right, None).bfloat16().to(left.dtype)
    return total if rest is None else (total + rest).to(left.dtype)


@product_fault
def sums_in_bf16(left, right, rest):
    total = torch.zeros(left.shape[0], right.shape[1])
    for d in range(0, left.shape[1], 64):
        total = (total + left[:, d : d + 64].float() @ right[d : d + 64].float()).bfloat16().float()
    return (total if rest is None else total + rest).to(left.dtype)


@product_fault
def one_chain_in_fp32(left, right, rest):
    if left.shape[1] < 10_000:
        return exact_product(left, right, rest)
    terms = (left.float()[:, :, None] * right.float()[None]).numpy()
    total = torch.from_numpy(np.add.accumulate(terms, axis=1)[:, -1].copy())  # one after the other, in fp32
    return (total if rest is None else total + rest).to(left.dtype)


@product_fault
def the_last_row_not_written(left, right, rest):
    out = exact_product(left, right, rest)
    return torch.cat([out[:-1], torch.full_like(out[-1:], torch.nan)]) if len(out) > 6 else out


@product_fault
def rows_from_the_sixth_on_swapped(left, right, rest):
    out = exact_product(left, right, rest)
    return torch.cat([out[:6], out[6:].flip(0)])


@product_fault
def the_last_column_of_a_panel_repeated(left, right, rest):
    out = exact_product(left, right, rest)
    if out.shape[1] > 64:
        out[:, 64] = out[:, 63]
    return out


@product_fault
def infinities_cut_off(left, right, rest):
    return exact_product(left, right, rest).nan_to_num(nan=0.0)


@product_fault
def a_row_that_is_not_finite_spoils_its_neighbour(left, right, rest):
    out = exact_product(left, right, rest)
    return out + 0 * out.sum() if len(out) else out


@product_fault
def strides_ignored(left, right, rest):
    span = left.shape[0] * left.shape[1]
    inside = span <= left.untyped_storage().nbytes() // left.element_size() - left.storage_offset()
    return exact_product(left.as_strided(left.shape, (left.shape[1], 1)) if inside else left, right, rest)


@product_fault
def fp16_by_way_of_bf16(left, right, rest):
    return exact_product(left.bfloat16().to(left.dtype), right, rest)


@product_fault
def another_result_each_time(left, right, rest):
    out = exact_product(left, right, rest)
    return out * (1 + torch.rand(()).to(out.dtype) * torch.finfo(out.dtype).eps * 0.9)
