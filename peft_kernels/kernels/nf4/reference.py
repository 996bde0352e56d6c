"""Quantising and dequantising 4-bit weights in plain PyTorch; the maths are those of `formats.nf4_values`."""

import torch
from torch import Tensor

from ...formats import nf4_values
from ...formats.nf4 import check_tensors, check_type, check_vector

_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32)


def check_quantize(weight: Tensor, quant_type: str, blocksize: int) -> None:
    """Raise ValueError unless the arguments of nf4_quantize fit."""
    check_type("nf4_quantize", quant_type, blocksize)
    if weight.dtype not in _WEIGHTS:
        raise ValueError(f"nf4_quantize: weight is {weight.dtype}; expected float16, bfloat16 or float32")


def nf4_quantize(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight, any shape and strides -> packed uint8 [ceil(numel / 2)], absmax fp32 [ceil(numel / blocksize)].

    The absmax of a block that holds NaN is NaN, of one with an infinity infinite: the caller looks there.
    """
    check_quantize(weight, quant_type, blocksize)
    return nf4_values.encode(weight, quant_type, blocksize)


def check_scales(absmax: Tensor, nested_code: Tensor) -> None:
    """Raise ValueError unless the arguments of nf4_quantize_scales fit."""
    check_vector("nf4_quantize_scales", "absmax", absmax, torch.float32, absmax.numel(), absmax.device)
    check_vector("nf4_quantize_scales", "nested_code", nested_code, torch.float32, 256, absmax.device)


def nf4_quantize_scales(absmax: Tensor, nested_code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 [blocks], nested_code fp32 [256], ascending -> uint8 [blocks], nested_absmax [ceil(blocks / 256)] and
    nested_offset [1], both fp32."""
    check_scales(absmax, nested_code)
    return nf4_values.encode_scales(absmax, nested_code)


def check_dequantize(*args) -> None:
    """Raise ValueError unless the arguments of nf4_dequantize fit."""
    *weight, dtype = args
    check_tensors("nf4_dequantize", *weight)
    if dtype not in (*_WEIGHTS, torch.float64):
        raise ValueError(f"nf4_dequantize: dtype is {dtype}; expected float16, bfloat16, float32 or float64")


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> [numel] in `dtype`; float64 holds the fp32 values."""
    tensors = packed, absmax, nested_absmax, nested_code, nested_offset
    check_dequantize(*tensors, quant_type, blocksize, numel, dtype)
    return nf4_values.dequantize(*tensors, quant_type, blocksize, numel, dtype)
