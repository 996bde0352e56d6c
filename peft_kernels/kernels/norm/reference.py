"""LayerNorm's and RMSNorm's maths, forward and every gradient, in plain PyTorch.

    total = x + residual, rounded to x's dtype (x itself without a residual)
    xhat  = (total - mean) rstd, rstd = 1 / sqrt(var + eps); RMSNorm: xhat = total / sqrt(mean(total**2) + eps)
    y     = xhat * weight + bias
    g     = dy * weight
    dx    = rstd (g - mean(g) - xhat mean(g xhat)) + dtotal; RMSNorm: without mean(g)

Means are over a row; var is the biased one, of centred values: E[x**2] - E[x]**2 cancels. (Ba et al. 2016, arXiv
1607.06450; Zhang and Sennrich 2019, arXiv 1910.07467.)
"""

import torch
from torch import Tensor

from ..._core.dtypes import accumulator


def _refuse(op: str, name: str, value: Tensor, expected: str) -> None:
    raise ValueError(f"{op}: {name} is {value.dtype} {list(value.shape)}; expected {expected}")


def _check_kinds(op: str, first: str, value: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all are floating and on the device of the first."""
    for name, one in {first: value, **others}.items():
        if one is not None and not one.is_floating_point():
            _refuse(op, name, one, "a floating dtype")
        if one is not None and one.device != value.device:
            raise ValueError(f"{op}: {name} is on {one.device}; expected {value.device}, as {first}")


def _check_dtype(op: str, dtype: torch.dtype, own: torch.dtype) -> None:
    if dtype not in (own, accumulator(own)):
        raise ValueError(f"{op}: dtype is {dtype}; expected {own} as x, or {accumulator(own)}")


def check_fwd(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, dtype) -> None:
    """Raise ValueError unless x is [M, K] with K at least 1 and the others fit it."""
    _check_kinds("norm_fwd", "x", x, residual=residual, weight=weight, bias=bias)
    if x.dim() != 2 or x.shape[1] == 0:
        _refuse("norm_fwd", "x", x, "two dimensions, [M, K], K at least 1")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        _refuse("norm_fwd", "residual", residual, f"{x.dtype} {list(x.shape)} as x")
    for name, row in (("weight", weight), ("bias", bias)):
        if row is not None and row.shape != x.shape[1:]:
            _refuse("norm_fwd", name, row, f"[{x.shape[1]}] to match x {list(x.shape)}")
    _check_dtype("norm_fwd", dtype, x.dtype)


def check_bwd(
    dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype
) -> None:  # fmt: skip
    """Raise ValueError unless dy is [M, K] and what the gradients asked for need is there and fits it."""
    _check_kinds("norm_bwd", "dy", dy, dtotal=dtotal, x=x, mean=mean, rstd=rstd, weight=weight)
    if dy.dim() != 2 or dy.shape[1] == 0:
        _refuse("norm_bwd", "dy", dy, "two dimensions, [M, K], K at least 1")
    M, K = dy.shape
    wide = accumulator(dx_dtype)
    if dy.dtype not in (dx_dtype, wide):
        _refuse("norm_bwd", "dy", dy, f"{dx_dtype} as dx, or {wide}")
    _check_dtype("norm_bwd", dtype, dx_dtype)
    normalises = need_dx or need_dweight
    for name, value, shape, kind, needed in (
        ("dtotal", dtotal, (M, K), dx_dtype, False),
        ("x", x, (M, K), dx_dtype, normalises),
        ("mean", None if rms else mean, (M,), wide, normalises and not rms),
        ("rstd", rstd, (M,), wide, normalises),
        ("weight", weight, (K,), None, False),
    ):
        if value is None and needed:
            raise ValueError(f"norm_bwd: {name} is None; expected {kind} {list(shape)}, as dx or dweight is asked for")
        if value is not None and (tuple(value.shape) != shape or kind not in (None, value.dtype)):
            _refuse("norm_bwd", name, value, f"{kind or 'a tensor'} {list(shape)} to match dy {[M, K]}")


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [M, K], any strides; weight, bias [K] -> y [M, K], total [M, K], mean [M], rstd [M].

    y is in `dtype`, x's own or float32 (float64 for fp64); mean and rstd are of the rounded total, in fp32 (fp64).
    total is empty(0) without a residual, mean for RMSNorm.
    """
    check_fwd(x, residual, weight, bias, dtype)
    wide = accumulator(x.dtype)
    total = x.new_empty(0) if residual is None else (x + residual).contiguous()
    centred = (x if residual is None else total).to(wide).contiguous()
    mean = x.new_empty(0, dtype=wide)
    if not rms:
        mean = centred.mean(1)
        centred = centred - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    y = centred * rstd[:, None]
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(dtype), total, mean, rstd


def norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, rms: bool, need_dx: bool, need_dweight: bool, need_dbias: bool, dtype, dx_dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy [M, K] and what norm_fwd was given (x: the total, where there is one) -> dx [M, K], dweight [K], dbias [K].

    dy is of dx_dtype or its accumulator's dtype; dtotal, the gradient that reaches the total from elsewhere, is added
    to dx before its one rounding. dweight and dbias are sums over rows in `dtype`, dx_dtype or its accumulator's. What
    is not needed is empty(0). x and rstd may be None where dbias alone is needed, mean then and for RMSNorm.
    """
    check_bwd(dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype)
    wide = accumulator(dx_dtype)
    dx, dweight, dbias = dy.new_empty(0, dtype=dx_dtype), dy.new_empty(0, dtype=dtype), dy.new_empty(0, dtype=dtype)
    dy = dy.to(wide)
    if need_dbias:
        dbias = dy.sum(0).to(dtype)
    if not (need_dx or need_dweight):
        return dx, dweight, dbias
    xhat = x.to(wide).contiguous()
    xhat = (xhat if rms else xhat - mean[:, None]) * rstd[:, None]
    if need_dweight:
        dweight = (dy * xhat).sum(0).to(dtype)
    if need_dx:
        g = (dy if weight is None else dy * weight.to(wide)).contiguous()
        dx = g - xhat * (g * xhat).mean(1, keepdim=True)
        if not rms:
            dx = dx - g.mean(1, keepdim=True)
        dx = dx * rstd[:, None]
        dx = (dx if dtotal is None else dx + dtotal.to(wide)).to(dx_dtype).contiguous()
    return dx, dweight, dbias
