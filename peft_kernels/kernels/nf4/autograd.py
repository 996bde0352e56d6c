"""nf4_quantize and nf4_dequantize: checks, and the ops. Neither has a derivative: a quantised weight is frozen."""

import torch
from torch import Tensor

from ..._core.checks import has_values, refuse
from ...formats.nf4 import NF4Weight, check_asked, nested_code
from . import op


def nf4_quantize(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantise a weight to 4 bits, to the bytes that bitsandbytes' CUDA kernels give.

    Args:
        weight: any shape and strides (blocks run over its row-major elements), float16, bfloat16 or float32.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: store the scales in 8 bits (QLoRA's double quantisation).

    A block of zeros has bytes 0x77 in NF4, as in bitsandbytes' CPU code; its CUDA code gives 0x00, which decodes to -0.
    Waits for the device once, to look for NaN and infinities.

    Raises:
        ValueError: an argument that does not fit, or a weight that holds NaN or an infinity.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"nf4_quantize: weight is {weight!r}; expected a tensor")
    check_asked("nf4_quantize", quant_type, blocksize, double_quant)
    packed, absmax = op.nf4_quantize(weight.detach(), quant_type, blocksize)
    if has_values(weight) and not bool(absmax.isfinite().all()):
        refuse("nf4_quantize", "weight", weight, "finite values; it holds NaN or an infinity")
    nested = None, None, None
    if double_quant:
        code = nested_code(weight.device)
        absmax, nested_absmax, offset = op.nf4_quantize_scales(absmax, code)
        nested = nested_absmax, code, offset
    return NF4Weight(packed, absmax, *nested, tuple(weight.shape), weight.dtype, quant_type, blocksize)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight's values, in its shape: level * scale in fp32, rounded once to `dtype`.

    Args:
        dtype: float16, bfloat16, float32 or float64 (which holds the fp32 values); default the dtype the weight had.

    Raises:
        ValueError: not an NF4Weight, or another dtype.
    """
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"nf4_dequantize: weight is {type(weight).__name__}; expected an NF4Weight")
    if not isinstance(dtype, torch.dtype | None):
        raise ValueError(f"nf4_dequantize: dtype is {dtype!r}; expected float16, bfloat16, float32 or float64")
    args = *weight.tensors(), weight.quant_type, weight.blocksize, weight.numel, dtype or weight.dtype
    return op.nf4_dequantize(*args).view(weight.shape)
