"""bias_linear: checks, the choice of what to save, and the thin autograd.Function around F.linear and bias_grad."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op
from .reference import accumulator

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


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
        args = (dy, *ctx.saved_tensors, ctx.needed, *ctx.dtypes)
        # Under create_graph the gradients must not pass for constants: a node that raises stands behind them.
        return _NoSecondDerivative.apply(*args) if torch.is_grad_enabled() else _gradients(*args)


class _NoSecondDerivative(torch.autograd.Function):
    """The backward, recorded only so that differentiating it says what is wrong."""

    @staticmethod
    def forward(ctx, *args):
        return _gradients(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("bias_linear has no second derivative: use torch.nn.functional.linear for double backward")


def _autocasts(device: torch.device) -> bool:
    # Asked of meta, is_autocast_enabled raises; torch 2.11 cannot compile is_autocast_available.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _refuse(name: str, tensor: Tensor, expected: str) -> None:
    came = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    raise ValueError(f"bias_linear: {name} is {came}; expected {expected}")


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    # Each call pays for this: messages are made only where something is wrong.
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor.dtype not in _DTYPES:
            _refuse(name, tensor, "a floating dtype: float16, bfloat16, float32 or float64")
        if tensor.device != x.device:
            _refuse(name, tensor, f"the device of x, {x.device}")
    if weight.dim() != 2:
        _refuse("weight", weight, "two dimensions, [N, K]")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        _refuse("x", x, f"[..., {K}] to match weight [{N}, {K}]")
    if weight.dtype != x.dtype and not _autocasts(x.device):
        _refuse("weight", weight, f"x's dtype, {x.dtype}")
    if bias.shape != (N,):
        _refuse("bias", bias, f"[{N}] to match weight [{N}, {K}]")


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
    if _autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dim() == 2:
        return _BiasLinear.apply(x, weight, bias)
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)  # reshape(-1, K) would not know M where K is 0
    return _BiasLinear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
