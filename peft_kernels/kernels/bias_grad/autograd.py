"""bias_linear: checks, the choice of what to save, and the thin autograd.Function around F.linear and bias_grad."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.checks import autocasts, check_kind, refuse, rows
from ..._core.derivatives import first_only
from . import op
from .reference import accumulator

_NAME = "bias_linear"
_ONCE = "bias_linear has no second derivative: use torch.nn.functional.linear for double backward"


def _gradients(dy, x, weight, needed, weight_dtype, bias_dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias, None where not needed."""
    need_dx, need_dweight, need_dbias = needed
    dx = dy @ weight.to(dy.dtype) if need_dx else None
    dweight = (dy.t() @ x).to(weight_dtype) if need_dweight else None
    dbias = None
    if need_dbias:
        # A bias of another dtype is made from the sums in the accumulator, not from what dy's dtype leaves of them.
        out = dy.dtype if bias_dtype == dy.dtype else accumulator(dy.dtype)
        dbias = op.bias_grad(dy, out).to(bias_dtype)
    return dx, dweight, dbias


class _BiasLinear(torch.autograd.Function):
    """x is [M, K] here; leading dimensions are flattened by the caller."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        need_dx, need_dweight, _ = ctx.needed = ctx.needs_input_grad
        # The weight as it came, not the copy in x's dtype: a parameter costs nothing to keep.
        ctx.save_for_backward(x if need_dweight else None, weight if need_dx else None)
        ctx.dtypes = weight.dtype, bias.dtype
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return first_only(_ONCE, _gradients, dy, *ctx.saved_tensors, ctx.needed, *ctx.dtypes)


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


def bias_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias as `torch.nn.functional.linear`, with a backward made for training the bias alone (BitFit).

    Args:
        x: [..., K], floating, any strides.
        weight: [N, K] in x's dtype (under autocast any floating dtype).
        bias: [N], any floating dtype: it is cast to x's, and its gradient comes from fp32 sums (fp64 for fp64).

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Saved for backward: weight if x requires grad, x only if weight does. The bias gradient is the same bit for bit
    from run to run. A second derivative raises RuntimeError; `torch.func` transforms are not supported.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    _check(x, weight, bias)
    if autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _BiasLinear.apply(rows(x), weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
