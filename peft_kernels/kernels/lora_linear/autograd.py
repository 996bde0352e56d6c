"""lora_linear: checks, the choice of what to save, and the thin autograd.Function around the two ops."""

import torch
from torch import Tensor

from ..._core.checks import autocasts, check_kind, refuse, rows
from ..._core.derivatives import first_only, recorded
from .._shared.branch_checks import check_bias_and_dropout, check_branch
from .._shared.drop_levels import drop_threshold, effective_scaling
from . import op

_NAME = "lora_linear"
_ONCE = "lora_linear has no second derivative: use the reference for double backward"


class _LoRALinear(torch.autograd.Function):
    """x is [M, K] here; leading dimensions are flattened by the caller."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, seed, scaling, threshold):
        y, s, mask = op.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, threshold)
        need_dx, need_dweight, need_dlora_a, need_dlora_b, need_dbias = ctx.needs_input_grad[:5]
        # x is the one large tensor: kept only for the gradients that are made from it (LoRA-FA freezes lora_a).
        keep_x = need_dlora_a or need_dweight
        # s is made of x: a second derivative would take it for a constant, but for an output that leads there.
        origin = y.new_empty(0) if need_dx and need_dlora_b and not keep_x else None
        ctx.save_for_backward(
            x if keep_x else None,
            weight if need_dx else None,
            lora_a,
            lora_b,
            s if need_dlora_b else None,
            mask if mask.numel() and (need_dx or need_dlora_a) else None,
            origin,
        )
        ctx.scaling = scaling
        ctx.needed = (need_dx, need_dlora_a, need_dlora_b, need_dbias)
        ctx.need_dweight = need_dweight
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, origin

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, lora_a, lora_b, s, mask, origin = ctx.saved_tensors
        if mask is None:
            mask = dy.new_empty(0, dtype=torch.uint8)
        args = (dy, x, weight, lora_a, lora_b, s, mask, ctx.scaling, *ctx.needed)
        grads = first_only(_ONCE, op.lora_linear_bwd, *args, origin=origin)
        dx, dlora_a, dlora_b, dbias = (g if n else None for g, n in zip(grads, ctx.needed, strict=True))
        dweight = (dy.t() @ x).to(ctx.weight_dtype) if ctx.need_dweight else None
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dx, dweight, dlora_a, dlora_b, dbias, None, None, None


def _check(x, weight, lora_a, lora_b, bias, dropout_p) -> None:
    check_branch(_NAME, x, lora_a, lora_b, getattr(weight, "shape", None))
    N, K = lora_b.shape[0], x.shape[-1]
    if weight is not None:
        check_kind(_NAME, "weight", weight, x.device)
        if weight.shape != (N, K):
            refuse(_NAME, "weight", weight, f"[{N}, {K}]")
        if weight.dtype != x.dtype and not autocasts(x.device):
            refuse(_NAME, "weight", weight, f"x's dtype, {x.dtype}")
    check_bias_and_dropout(_NAME, x, bias, N, dropout_p)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x @ weight.T + bias + scaling * dropout(x) @ lora_a.T @ lora_b.T, differentiable in every tensor.

    Args:
        x: [..., K], floating, any strides.
        weight: [N, K] in x's dtype (under autocast any floating dtype); None leaves the base product out.
        lora_a: [R, K], R >= 1, any floating dtype; cast to x's dtype inside, x is never cast to it.
        lora_b: [N, R], any floating dtype.
        scaling: factor of the low-rank product (lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA).
        bias: [N], any floating dtype, or None.
        dropout_p: probability of dropping an element of x on the low-rank branch, as `nn.Dropout`; rounded to 2**-16.
            A dropped element counts as 0 even where x is inf or nan (`nn.Dropout` multiplies: inf * 0 is nan).
            The mask comes from the device's default generator, so `torch.manual_seed` and activation
            checkpointing reproduce it.

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Saved for backward: x (only if lora_a or weight trains), drop(x) @ lora_a.T [M, R] (only if lora_b trains)
    and one bit per element of x with dropout. A second derivative raises RuntimeError; `torch.func` transforms are
    not supported. The rank-sized intermediates are of x's dtype: in float16 scale the loss, as always in float16
    (up to 4 rows on a CPU they stay in fp32 for y, and adapters in their own dtype).

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
    args = rows(x), weight, lora_a, lora_b, bias, seed, scaling, threshold
    y, *_ = _LoRALinear.apply(*args) if recorded(_NAME, *args[:5]) else op.lora_linear_fwd(*args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], lora_b.shape[0])
