"""bias_linear: checks, the choice of what to save, and the thin autograd.Function around F.linear and the ops."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.checks import autocasts, check_kind, refuse, rows
from ..._core.derivatives import first_only, recorded
from ..._core.dtypes import accumulator
from . import op
from .activations import check_activation

_NAME = "bias_linear"
_ONCE = "bias_linear has no second derivative: use torch.nn.functional.linear for double backward"


_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}


def _forward(x, weight, bias, activation: str | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    """act(z) of z = x @ weight.T + bias, and of z what its backward needs: None, ReLU's mask, or z itself."""
    z = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    if activation is None:
        return z, None
    if not keep:
        return _ACTIVATIONS[activation](z), None
    return op.relu_fwd(z) if activation == "relu" else (_ACTIVATIONS[activation](z), z)


def _gradients(
    dy, x, weight, kept, activation, needed, weight_dtype, bias_dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias, None where not needed."""
    need_dx, need_dweight, need_dbias = needed
    # A bias of another dtype is made from the sums in the accumulator, not from what dy's dtype leaves of them.
    out = dy.dtype if bias_dtype == dy.dtype else accumulator(dy.dtype)
    if activation is None:
        dz, dbias = dy, op.bias_grad(dy, out) if need_dbias else None
    else:
        dz, dbias = op.act_bwd(dy, kept, activation, need_dx or need_dweight, need_dbias, out)
    dx = dz @ weight.to(dz.dtype) if need_dx else None
    dweight = (dz.t() @ x).to(weight_dtype) if need_dweight else None
    return dx, dweight, dbias.to(bias_dtype) if need_dbias else None


class _BiasLinear(torch.autograd.Function):
    """x is [M, K] here; leading dimensions are flattened by the caller."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        need_dx, need_dweight, _ = ctx.needed = ctx.needs_input_grad[:3]
        y, kept = _forward(x, weight, bias, activation, True)
        # The weight as it came, not the copy in x's dtype: a parameter costs nothing to keep.
        # z is made here: a second derivative would take it for a constant, but for an output that leads to its inputs.
        origin = None if kept is None or activation == "relu" else y.new_empty(0)
        ctx.save_for_backward(x if need_dweight else None, weight if need_dx else None, kept, origin)
        ctx.activation, ctx.dtypes = activation, (weight.dtype, bias.dtype)
        ctx.set_materialize_grads(False)  # of origin there is none
        return y, origin

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None
        *saved, origin = ctx.saved_tensors
        args = dy, *saved, ctx.activation, ctx.needed, *ctx.dtypes
        return *first_only(_ONCE, _gradients, *args, origin=origin), None


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_kind(_NAME, name, tensor, x.device)
    if weight.dim() != 2:
        refuse(_NAME, "weight", weight, "two dimensions, [N, K]")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        refuse(_NAME, "x", x, f"[..., {K}] to match weight [{N}, {K}]")
    if weight.dtype != x.dtype and not autocasts(x.device):
        refuse(_NAME, "weight", weight, f"x's dtype, {x.dtype}")
    if bias.shape != (N,):
        refuse(_NAME, "bias", bias, f"[{N}] to match weight [{N}, {K}]")


def bias_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
    """act(x @ weight.T + bias), with a backward made for training the bias alone (BitFit).

    Args:
        x: [..., K], floating, any strides.
        weight: [N, K] in x's dtype (under autocast any floating dtype).
        bias: [N], any floating dtype: it is cast to x's, and its gradient comes from fp32 sums (fp64 for fp64).
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu", as `torch.nn.functional`'s.

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Saved for backward: weight if x requires grad, x only if weight does, and with an activation z = x @ weight.T + bias
    if anything does, of which "relu" keeps one bit per element. One pass over the gradient of y makes both that of z
    and that of the bias, which is the sum of what has not been rounded yet. The bias gradient is the same bit for bit
    from run to run. At the infinities the derivatives are 0 and 1. A second derivative raises RuntimeError;
    `torch.func` transforms are not supported.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit, naming the argument.
    """
    _check(x, weight, bias)
    if activation is not None:
        check_activation(_NAME, activation, "None or ")
    if autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    args = rows(x), weight, bias, activation
    y, _ = _BiasLinear.apply(*args) if recorded(_NAME, *args[:3]) else _forward(*args, False)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
