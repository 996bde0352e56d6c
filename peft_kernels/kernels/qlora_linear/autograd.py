"""qlora_linear: checks, the choice of what to save, and the thin autograd.Function around its parts."""

import torch
from torch import Tensor

from ..._core.checks import autocasts, refuse, rows
from ..._core.derivatives import first_only, recorded
from ...formats.nf4 import NF4Weight
from .._shared.branch_checks import check_bias_and_dropout, check_branch
from .._shared.drop_levels import drop_threshold, effective_scaling
from . import parts

_NAME = "qlora_linear"
_ONCE = "qlora_linear has no second derivative: dequantise the weight and use the LoRA linear's reference"


class _QLoRALinear(torch.autograd.Function):
    """x is [M, K] here; leading dimensions are flattened by the caller."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, bias, seed, scaling, threshold, quant_type, blocksize, *weight):
        y, s, mask = parts.forward(x, weight, quant_type, blocksize, lora_a, lora_b, bias, seed, scaling, threshold)
        ctx.needed = need_dx, need_dlora_a, need_dlora_b, _ = ctx.needs_input_grad[:4]
        # s is made of x: a second derivative would take it for a constant, but for an output that leads there.
        origin = y.new_empty(0) if need_dx and need_dlora_b and not need_dlora_a else None
        ctx.save_for_backward(
            origin,
            x if need_dlora_a else None,
            lora_a,
            lora_b,
            s if need_dlora_b else None,
            mask if mask.numel() and (need_dx or need_dlora_a) else None,
            *(weight if need_dx else (None,) * 5),
        )
        ctx.settings = quant_type, blocksize, scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, origin

    @staticmethod
    def backward(ctx, dy, _):
        origin, x, lora_a, lora_b, s, mask, *weight = ctx.saved_tensors
        if mask is None:
            mask = dy.new_empty(0, dtype=torch.uint8)
        quant_type, blocksize, scaling = ctx.settings
        args = dy, x, tuple(weight), quant_type, blocksize, lora_a, lora_b, s, mask, scaling, *ctx.needed
        grads = first_only(_ONCE, parts.backward, *args, origin=origin)
        dx, dlora_a, dlora_b, dbias = (g if n else None for g, n in zip(grads, ctx.needed, strict=True))
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dx, dlora_a, dlora_b, dbias, *(None,) * 10


def _check(x, weight, lora_a, lora_b, bias, dropout_p) -> None:
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"{_NAME}: weight is {type(weight).__name__}; expected an NF4Weight (see nf4_quantize)")
    check_branch(_NAME, x, lora_a, lora_b, weight.shape)
    N, K = lora_b.shape[0], x.shape[-1]
    if weight.shape != (N, K):
        raise ValueError(f"{_NAME}: weight has shape {list(weight.shape)}; expected [{N}, {K}]")
    if weight.device != x.device:
        refuse(_NAME, "weight.packed", weight.packed, f"the device of x, {x.device}")
    check_bias_and_dropout(_NAME, x, bias, N, dropout_p)


def qlora_linear(
    x: Tensor,
    weight: NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x @ W.T + bias + scaling * dropout(x) @ lora_a.T @ lora_b.T over a 4-bit base, differentiable in all but W.

    Args:
        x: [..., K], floating, any strides. Products are made in its dtype, whatever dtype the weight had.
        weight: of shape [N, K], frozen; see `nf4_quantize`.
        lora_a, lora_b, scaling, bias, dropout_p: as `lora_linear`'s, [R, K], [N, R] and [N].

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Saved for backward: the 4-bit weight if x requires grad, x if lora_a does, drop(x) @ lora_a.T [M, R] if lora_b does,
    and one bit per element of x with dropout; never a dequantised weight. While 512 rows and more are multiplied one
    dequantised weight is there. A second derivative raises RuntimeError; `torch.func` transforms are not supported.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    _check(x, weight, lora_a, lora_b, bias, dropout_p)
    if autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    threshold = drop_threshold(dropout_p)
    seed = None
    if threshold:
        scaling = effective_scaling(scaling, threshold)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    flat, stored, settings = rows(x), weight.tensors(), (weight.quant_type, weight.blocksize)
    branch, drop = (lora_a, lora_b, bias), (seed, scaling, threshold)
    if recorded(_NAME, flat, *branch):
        y, _ = _QLoRALinear.apply(flat, *branch, *drop, *settings, *stored)
    else:
        y = parts.forward(flat, stored, *settings, *branch, *drop)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], lora_b.shape[0])
