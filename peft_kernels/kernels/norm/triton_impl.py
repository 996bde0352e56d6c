"""norm_fwd and norm_bwd in Triton: which kernels a shape takes, and their launches."""

from functools import lru_cache

import torch
from torch import Tensor

from .._shared.columns import add_parts
from .._shared.launch import Plan, cdiv, launch
from . import reference
from .configs import LOOP_BLOCK, STEPS, fits_backward, fits_forward, pick_backward, pick_columns, pick_forward
from .triton_backward import _norm_bwd_columns_kernel, _norm_bwd_rows_kernel, _norm_bwd_terms_kernel
from .triton_forward import _norm_fwd_kernel, _norm_fwd_looped_kernel

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _row(weight: Tensor | None, instead: Tensor) -> Tensor:
    """weight as the kernels read it; where there is none, something that is never read."""
    return instead if weight is None else weight.contiguous()


@lru_cache(maxsize=4096)
def _forward_plan(M: int, K: int, residual: bool, weight: bool, bias: bool, rms: bool, *_dtypes) -> Plan:
    tile = pick_forward(K)
    constants = {"HAS_RESIDUAL": residual, "HAS_WEIGHT": weight, "HAS_BIAS": bias, "RMS": rms}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    return Plan((cdiv(M, tile.block_m), 1, 1), constants, tile.num_warps, 1)


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of reference.norm_fwd, which float64 and empty matrices run on any device."""
    if x.dtype not in _DTYPES or x.numel() == 0:
        return reference.norm_fwd(x, residual, weight, bias, eps, rms, dtype)
    reference.check_fwd(x, residual, weight, bias, dtype)
    M, K = x.shape
    y, total = x.new_empty((M, K), dtype=dtype), x.new_empty(0 if residual is None else (M, K))
    mean, rstd = x.new_empty(0 if rms else M, dtype=torch.float32), x.new_empty(M, dtype=torch.float32)
    plan = _forward_plan(M, K, residual is not None, weight is not None, bias is not None, rms, x.dtype, dtype)
    added = x if residual is None else residual
    inputs, outputs = (x, added, _row(weight, x), _row(bias, x)), (y, total, mean, rstd)
    kernel = _norm_fwd_kernel if fits_forward(K) else _norm_fwd_looped_kernel
    launch(kernel, plan, inputs, outputs, (M, K, *x.stride(), *added.stride(), eps))
    return y, total, mean, rstd


@lru_cache(maxsize=4096)
def _backward_plan(M, K, by_rows, dtotal, weight, rms, need_dx, need_dweight, need_dbias, kept, *_dtypes) -> Plan:
    """Plan and span of the pass that makes the gradients; `kept` is the dtype of x, or of dy where there is no x."""
    tile = pick_backward(M, K, need_dweight + need_dbias) if by_rows else pick_columns(M, K, kept, need_dx)
    constants = {"HAS_DTOTAL": dtotal, "HAS_WEIGHT": weight, "RMS": rms}
    constants |= {} if by_rows else {"NEED_DX": need_dx}
    constants |= {"NEED_DWEIGHT": need_dweight, "NEED_DBIAS": need_dbias}
    constants |= {"STEPS": STEPS, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    parts = cdiv(M, tile.span)
    grid = (parts, 1, 1) if by_rows else (cdiv(K, tile.block_k), parts, 1)
    return Plan(grid, constants, tile.num_warps, 1), tile.span, parts


@lru_cache(maxsize=4096)
def _terms_plan(M: int, weight: bool, rms: bool, *_dtypes) -> Plan:
    constants = {"HAS_WEIGHT": weight, "RMS": rms, "BLOCK_M": 1, "BLOCK_K": LOOP_BLOCK}
    return Plan((M, 1, 1), constants, LOOP_BLOCK // 512, 1)


def norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, rms: bool, need_dx: bool, need_dweight: bool, need_dbias: bool, dtype, dx_dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results of reference.norm_bwd, which float64 and empty matrices run on any device."""
    needed = need_dx, need_dweight, need_dbias
    if dx_dtype not in _DTYPES or dy.numel() == 0 or not any(needed):
        return reference.norm_bwd(dy, dtotal, x, mean, rstd, weight, rms, *needed, dtype, dx_dtype)
    reference.check_bwd(dy, dtotal, x, mean, rstd, weight, rms, *needed, dtype, dx_dtype)
    (M, K), sums = dy.shape, need_dweight + need_dbias
    if not need_dx:
        dtotal = weight = None
    by_rows = need_dx and fits_backward(K, sums)
    flags = dtotal is not None, weight is not None, rms
    x, mean, rstd = (dy if one is None else one for one in (x, None if rms else mean, rstd))
    kinds = x.dtype, dy.dtype, dtype
    plan, span, parts = _backward_plan(M, K, by_rows, *flags, *needed, *kinds)
    dx = dy.new_empty((M, K) if need_dx else 0, dtype=dx_dtype)
    dweight, dbias = (dy.new_empty(K if need else 0, dtype=dtype) for need in (need_dweight, need_dbias))
    made, start = (dweight, dbias), 0
    if parts > 1 and sums:
        made, start = 2 * (dy.new_empty((parts, sums * K), dtype=torch.float32),), K if need_dweight else 0
    row, added = _row(weight, dy), dy if dtotal is None else dtotal
    strides = (*dy.stride(), *added.stride(), *x.stride())
    scalars, inputs = (M, K, *strides, span, sums * K, start), (dy, added, x, mean, rstd, row)
    if by_rows:
        launch(_norm_bwd_rows_kernel, plan, inputs, (dx, *made), scalars)
    else:
        terms = _terms(dy, x, mean, rstd, row, *flags[1:]) if need_dx else dy
        launch(_norm_bwd_columns_kernel, plan, (*inputs, terms), (dx, *made), scalars)
    if made[0] is made[1]:
        out = [one for one in (dweight, dbias) if one.numel()]
        add_parts(made[0], *out)
    return dx, dweight, dbias


def _terms(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, row: Tensor, weight: bool, rms: bool) -> Tensor:
    """mean(g xhat) and mean(g) of every row, [1 or 2, M]."""
    M, K = dy.shape
    terms = dy.new_empty((1 if rms else 2, M), dtype=torch.float32)
    plan = _terms_plan(M, weight, rms, x.dtype, dy.dtype)
    launch(_norm_bwd_terms_kernel, plan, (dy, x, mean, rstd, row), (terms,), (M, K, *dy.stride(), *x.stride()))
    return terms


def _copies(*rows: Tensor | None) -> int:
    """Bytes of the contiguous copies that strided weights and biases need."""
    return sum(row.numel() * row.element_size() for row in rows if row is not None and not row.is_contiguous())


def norm_fwd_workspace(x, residual, weight, bias, eps, rms, dtype) -> int:
    """Bytes of temporaries that norm_fwd holds, from shapes, strides and dtypes only."""
    return _copies(weight, bias) if x.dtype in _DTYPES and x.numel() else 0


def norm_bwd_workspace(
    dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype
) -> int:  # fmt: skip
    """Bytes of temporaries that norm_bwd holds, from shapes, strides and dtypes only."""
    needed, sums = (need_dx, need_dweight, need_dbias), need_dweight + need_dbias
    if dx_dtype not in _DTYPES or dy.numel() == 0 or not any(needed):
        return 0
    (M, K), by_rows = dy.shape, need_dx and fits_backward(dy.shape[1], sums)
    kept = dy.dtype if x is None else x.dtype
    _, _, parts = _backward_plan(M, K, by_rows, False, False, rms, *needed, kept)
    held = 4 * parts * sums * K if parts > 1 else 0
    if need_dx:
        held += _copies(weight) + (0 if by_rows else 4 * M * (1 if rms else 2))
    return held
