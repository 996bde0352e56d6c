"""Faults planted in norm's backward."""

from collections.abc import Callable

import torch
from mutants_norm_forward import blocks_in_bf16, mean_of, padded
from torch import Tensor

from peft_kernels._core.dtypes import accumulator

BACKWARD: dict[str, Callable] = {}


def _backward(fault: Callable) -> Callable:
    BACKWARD[fault.__name__] = fault
    return fault


def _sum(terms: Tensor, dtype: torch.dtype) -> Tensor:
    return terms.sum(0).to(dtype)


def bwd(
    dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype,
    g=lambda dy, weight: dy if weight is None else dy * weight,
    dx=lambda g, xhat, m1, m2, rstd: (g - m1 - xhat * m2) * rstd,
    add=lambda dx, dtotal: dx + dtotal,
    row=mean_of, dweight=lambda dy, g, xhat: dy * xhat, dbias=lambda dy, g: dy, add_up=_sum,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reference, with faults in place of its steps."""
    wide = accumulator(dx_dtype)
    dy = dy.to(wide).contiguous()
    out = [dy.new_empty(0, dtype=kind) for kind in (dx_dtype, dtype, dtype)]
    grad = g(dy, None if weight is None else weight.to(wide))
    if need_dbias:
        out[2] = add_up(dbias(dy, grad), dtype)
    if need_dx or need_dweight:
        xhat = x.to(wide).contiguous()
        xhat = (xhat if rms else xhat - mean[:, None]) * rstd[:, None]
    if need_dweight:
        out[1] = add_up(dweight(dy, grad, xhat), dtype)
    if need_dx:
        m1 = torch.zeros_like(rstd) if rms else row(grad)
        found = dx(grad, xhat, m1[:, None], row(grad * xhat)[:, None], rstd[:, None])
        out[0] = (found if dtotal is None else add(found, dtotal.to(wide))).to(dx_dtype).contiguous()
    return tuple(out)


def _planted(name: str, **fault: Callable) -> None:
    BACKWARD[name] = lambda *args: bwd(*args, **fault)


def _in_bf16(terms: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros_like(terms.sum(0))
    for block in terms.split(max(16, len(terms) // 100)):
        total = (total + block.sum(0)).bfloat16().to(terms.dtype)
    return total.to(dtype)


def _in_one_chain(terms: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros_like(terms.sum(0))
    for block in terms.split(16 if len(terms) < 10_000 else 64):
        total = total + block.sum(0)
    return total.to(dtype)


def _in_any_order(terms: Tensor, dtype: torch.dtype) -> Tensor:
    return _sum(terms[torch.randperm(len(terms))], dtype)


_planted("the_mean_term_dropped", dx=lambda g, xhat, m1, m2, rstd: (g - xhat * m2) * rstd)
_planted("the_xhat_term_dropped", dx=lambda g, xhat, m1, m2, rstd: (g - m1) * rstd)
_planted("rstd_forgotten", dx=lambda g, xhat, m1, m2, rstd: g - m1 - xhat * m2)
_planted("a_sign_turned", dx=lambda g, xhat, m1, m2, rstd: (g - m1 + xhat * m2) * rstd)
_planted("the_gradient_of_total_dropped", add=lambda dx, dtotal: dx)
_planted("the_gradient_of_total_counted_twice", add=lambda dx, dtotal: dx + 2 * dtotal)
_planted("the_gradient_of_total_added_to_a_rounded_dx", add=lambda dx, dtotal: dx.bfloat16().to(dx.dtype) + dtotal)
_planted("the_weight_forgotten", g=lambda dy, weight: dy)
_planted("g_rounded", g=lambda dy, weight: dy if weight is None else (dy * weight).bfloat16().to(dy.dtype))
_planted("dweight_from_g", dweight=lambda dy, g, xhat: g * xhat)
_planted("dweight_of_rounded_products", dweight=lambda dy, g, xhat: (dy * xhat).bfloat16().to(dy.dtype))
_planted("dbias_from_g", dbias=lambda dy, g: g)
_planted("a_row_summed_in_bf16", row=blocks_in_bf16)
_planted("a_row_divided_by_its_padded_length", row=padded)
_planted("sums_in_bf16", add_up=_in_bf16)
_planted("sums_in_one_chain", add_up=_in_one_chain)
_planted("sums_in_another_order_each_time", add_up=_in_any_order)
_planted("sums_without_the_last_row", add_up=lambda terms, dtype: _sum(terms[:-1], dtype))
_planted("sums_without_a_short_tile_of_rows", add_up=lambda terms, dtype: _sum(terms[: len(terms) // 8 * 8], dtype))
_planted("sums_rounded_to_bf16", add_up=lambda terms, dtype: _sum(terms, dtype).bfloat16().to(dtype))
_planted("infinities_cut_off", add_up=lambda terms, dtype: _sum(terms, dtype).nan_to_num(nan=0.0))
_planted("sums_in_place_of_means", row=lambda terms: terms.sum(1))


@_backward
def the_mean_left_in_xhat(dy, dtotal, x, mean, *others):
    return bwd(dy, dtotal, x, None if mean is None else torch.zeros_like(mean), *others)


@_backward
def rms_norm_given_layer_norms_mean_term(dy, dtotal, x, mean, rstd, weight, rms, *others):
    if rms and rstd is not None:
        mean = torch.zeros_like(rstd)
    return bwd(dy, dtotal, x, mean, rstd, weight, False, *others)


@_backward
def statistics_made_anew_with_another_eps(dy, dtotal, x, mean, rstd, *others):
    if rstd is not None:
        rstd = ((1 / rstd.square()) + 1e-6).rsqrt()
    return bwd(dy, dtotal, x, mean, rstd, *others)


@_backward
def strides_of_dy_ignored(dy, *others):
    inside = dy.numel() <= dy.untyped_storage().nbytes() // dy.element_size() - dy.storage_offset()
    return bwd(dy.as_strided(dy.shape, (dy.shape[1], 1)) if inside else dy, *others)


@_backward
def a_row_stride_of_zero_taken_for_one_row(dy, *others):
    dx, dweight, dbias = bwd(dy, *others)
    return dx, dweight, dbias / (len(dy) if dy.stride(0) == 0 and len(dy) else 1)


@_backward
def nothing_written_for_no_rows(dy, *others):
    grads = bwd(dy, *others)
    return grads if len(dy) else tuple(torch.empty_like(one) for one in grads)


@_backward
def a_wide_dy_rounded_to_xs_dtype(dy, *rest):
    return bwd(dy.to(rest[-1]).to(dy.dtype), *rest)


@_backward
def the_mean_taken_from_rms_norm_too(dy, dtotal, x, mean, rstd, weight, rms, *rest):
    return bwd(dy, dtotal, x, mean, rstd, weight, rms and mean is None, *rest)
