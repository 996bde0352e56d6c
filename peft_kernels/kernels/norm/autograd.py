"""layer_norm and rms_norm: checks, the choice of what to save, and the thin autograd.Function around norm's ops."""

import torch
from torch import Tensor

from ..._core import native
from ..._core.checks import autocasts, check_kind, refuse, rows
from ..._core.derivatives import first_only, recorded
from ..._core.dtypes import accumulator
from . import op

_ONCE = "{0} has no second derivative: use torch.nn.functional.{0} for double backward"

_WIDENED = {
    function: frozenset(
        device
        for device in ("cpu", "cuda", "xpu", "mps")
        if native.has_native_kernel(f"aten::{function}", f"Autocast{device.upper()}")
    )
    for function in ("layer_norm", "rms_norm")
}
"""Function -> device types where Torch's autocast has it give fp32: on all but the CPU, whose 16-bit norms stay so."""


def _gradients(
    dy, dtotal, x, mean, rstd, weight, rms, needed, dx_dtype, weight_dtype, bias_dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias, None where not needed."""
    need_dx, need_dweight, need_dbias = needed
    if dy is None:  # the total alone was used
        return dtotal if need_dx else None, None, None
    # Of another dtype they are made from the sums in the accumulator, not from what x's dtype leaves of them.
    same = all(kind == dx_dtype for kind, n in ((weight_dtype, need_dweight), (bias_dtype, need_dbias)) if n)
    dtype = dx_dtype if same else accumulator(dx_dtype)
    if not need_dx:
        dtotal = None
    dx, dweight, dbias = op.norm_bwd(dy, dtotal, x, mean, rstd, weight, rms, *needed, dtype, dx_dtype)
    return (
        dx if need_dx else None,
        dweight.to(weight_dtype) if need_dweight else None,
        dbias.to(bias_dtype) if need_dbias else None,
    )


class _Norm(torch.autograd.Function):
    """x and residual are [M, K] here; leading dimensions are flattened by the caller."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, name, dtype):
        need_x, need_residual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        rms, need_dx = name == "rms_norm", need_x or need_residual
        y, total, mean, rstd = op.norm_fwd(x, residual, weight, bias, eps, rms, dtype)
        normalised = x if residual is None else total
        kept = (normalised, None if rms else mean, rstd) if need_dx or need_dweight else (None, None, None)
        # The weight as it came: a parameter costs nothing to keep.
        ctx.save_for_backward(*kept, weight if need_dx else None)
        ctx.name, ctx.rms, ctx.needed, ctx.inputs = (
            name,
            rms,
            (need_dx, need_dweight, need_dbias),
            (need_x, need_residual),
        )
        ctx.dtypes = x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if residual is None:
            return y
        if not need_dx:
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal=None):
        args = dy, dtotal, *ctx.saved_tensors, ctx.rms, ctx.needed, *ctx.dtypes
        dx, dweight, dbias = first_only(_ONCE.format(ctx.name), _gradients, *args)
        dx, dresidual = (dx if needed else None for needed in ctx.inputs)
        return dx, dresidual, dweight, dbias, None, None, None


def _check(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    check_kind(name, "x", x, x.device if isinstance(x, Tensor) else None)
    if x.dim() < 1 or x.shape[-1] == 0:
        refuse(name, "x", x, "[..., K], K at least 1")
    for what, row in (("weight", weight), ("bias", bias)):
        if row is not None:
            check_kind(name, what, row, x.device)
            if row.shape != x.shape[-1:]:
                refuse(name, what, row, f"[{x.shape[-1]}] to match x {list(x.shape)}")
    if residual is not None:
        check_kind(name, "residual", residual, x.device)
        if residual.shape != x.shape:
            refuse(name, "residual", residual, f"{list(x.shape)} as x")


def _norm(name, x, weight, bias, eps, residual) -> Tensor | tuple[Tensor, Tensor]:
    _check(name, x, weight, bias, residual)
    shape = x.shape
    if residual is not None and residual.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    dtype = accumulator(x.dtype) if autocasts(x.device) and x.device.type in _WIDENED[name] else x.dtype
    eps = torch.finfo(accumulator(x.dtype)).eps if eps is None else float(eps)
    tensors = rows(x), None if residual is None else rows(residual), weight, bias
    if recorded(name, *tensors):
        out = _Norm.apply(*tensors, eps, name, dtype)
    else:
        y, total, *_ = op.norm_fwd(*tensors, eps, name == "rms_norm", dtype)
        out = y if residual is None else (y, total)
    if len(shape) == 2:
        return out
    return out.view(shape) if residual is None else tuple(one.view(shape) for one in out)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of x, or of x + residual, with a backward that reads dy once for all gradients.

    Args:
        x: [..., K], floating, any strides, K at least 1.
        weight, bias: [K], any floating dtype, or None; their gradients are in that dtype, from fp32 sums (fp64 for
            fp64).
        eps: added to the variance.
        residual: [..., K] as x, added to it in the same pass; of another dtype, both are promoted as `+` does.

    Returns:
        y [..., K] in x's dtype; with a residual (y, total), total = x + residual rounded to its dtype, which is what y
        is made from. Under autocast y is float32 wherever torch.nn.functional.layer_norm's is: not on a CPU.

    Saved for backward: x (the total, where there is a residual) and the mean and 1 / std of each row in float32
    (float64) if x, residual or weight requires grad; weight if x or residual does; nothing where bias alone does. The
    gradients are the same bit for bit from run to run. A second derivative raises RuntimeError; `torch.func`
    transforms are not supported. (Ba et al. 2016, arXiv 1607.06450.)

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of x, or of x + residual: x / sqrt(mean(x**2) + eps) * weight + bias.

    Arguments, results, errors and what is saved are layer_norm's, but for the mean, which there is none of, and eps:
    None is torch.finfo's of the dtype that sums are carried in, float32 (float64 for float64), as
    torch.nn.functional.rms_norm takes it. (Zhang and Sennrich 2019, arXiv 1910.07467.)
    """
    return _norm("rms_norm", x, weight, bias, eps, residual)
