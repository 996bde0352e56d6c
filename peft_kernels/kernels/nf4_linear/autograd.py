"""nf4_linear: checks, and the thin autograd.Function around the two ops. x is never kept."""

import torch
from torch import Tensor

from ..._core.checks import autocasts, check_kind, refuse, rows
from ..._core.derivatives import first_only, recorded
from ..._core.dtypes import accumulator
from ...formats.nf4 import NF4Weight
from . import op

_NAME = "nf4_linear"
_ONCE = "nf4_linear has no second derivative: dequantise the weight and use torch.nn.functional.linear"


def _gradients(dy, tensors, quant_type, blocksize, K, needed, bias_dtype) -> tuple[Tensor | None, Tensor | None]:
    need_dx, need_dbias = needed
    dx = op.nf4_linear_bwd(dy, *tensors, None, quant_type, blocksize, K) if need_dx else None
    dbias = dy.sum(0, dtype=accumulator(dy.dtype)).to(bias_dtype) if need_dbias else None
    return dx, dbias


class _NF4Linear(torch.autograd.Function):
    """x is [M, K] here; leading dimensions are flattened by the caller."""

    @staticmethod
    def forward(ctx, x, bias, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, N):
        tensors = packed, absmax, nested_absmax, nested_code, nested_offset
        ctx.needed = ctx.needs_input_grad[:2]
        # Saved, not kept as attributes: a weight that is overwritten in between is found out by autograd.
        ctx.save_for_backward(*(tensors if ctx.needed[0] else (None,) * 5))
        ctx.settings = quant_type, blocksize, x.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return op.nf4_linear_fwd(x, *tensors, bias, None, quant_type, blocksize, N)

    @staticmethod
    def backward(ctx, dy):
        args = dy, ctx.saved_tensors, *ctx.settings, ctx.needed, ctx.bias_dtype
        return *first_only(_ONCE, _gradients, *args), *(None,) * 8


def _check(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> None:
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"{_NAME}: weight is {type(weight).__name__}; expected an NF4Weight (see nf4_quantize)")
    if len(weight.shape) != 2:
        raise ValueError(f"{_NAME}: weight has shape {list(weight.shape)}; expected two dimensions, [N, K]")
    check_kind(_NAME, "x", x, getattr(x, "device", None))
    if weight.device != x.device:
        refuse(_NAME, "weight.packed", weight.packed, f"the device of x, {x.device}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        refuse(_NAME, "x", x, f"[..., {K}] to match weight [{N}, {K}]")
    if bias is not None:
        check_kind(_NAME, "bias", bias, x.device)
        if bias.shape != (N,):
            refuse(_NAME, "bias", bias, f"[{N}] to match weight [{N}, {K}]")


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias over a 4-bit weight, differentiable in x and bias.

    Args:
        x: [..., K], floating, any strides. Whatever dtype the weight had, its values are used in x's or in fp32.
        weight: of shape [N, K], frozen; see `nf4_quantize`.
        bias: [N], any floating dtype, or None.

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Saved for backward: the 4-bit weight if x requires grad; never x, and never a dequantised weight. The result has
    the same bits every run, on a CPU with the C++ kernels on any number of threads. fp32 is multiplied in fp32; where
    Torch lets its own products on a CPU round to bf16 (`torch.set_float32_matmul_precision("medium")`, or
    `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`), one with AVX512-BF16 rounds x and the weight to it, and
    sums in fp32 as before. A second derivative raises RuntimeError; `torch.func` transforms are not supported.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    _check(x, weight, bias)
    if autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    tensors, settings = weight.tensors(), (weight.quant_type, weight.blocksize, weight.shape[0])
    if recorded(_NAME, x, bias):
        y = _NF4Linear.apply(rows(x), bias, *tensors, *settings)
    else:
        y = op.nf4_linear_fwd(rows(x), *tensors, bias, None, *settings)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
