"""Faults planted in norm's forward, and in the means over rows that its backward takes too."""

from collections.abc import Callable

import torch
from torch import Tensor

from peft_kernels._core.dtypes import accumulator

FORWARD: dict[str, Callable] = {}


def _forward(fault: Callable) -> Callable:
    FORWARD[fault.__name__] = fault
    return fault


def mean_of(terms: Tensor) -> Tensor:
    return terms.mean(1)


def _one_chain(terms: Tensor) -> Tensor:
    total = torch.zeros_like(terms[:, 0])
    for block in terms.split(16, dim=1):
        total = total + block.sum(1)
    return total / terms.shape[1]


def blocks_in_bf16(terms: Tensor) -> Tensor:
    total = torch.zeros_like(terms[:, 0])
    for block in terms.split(max(16, terms.shape[1] // 64), dim=1):
        total = (total + block.sum(1)).bfloat16().to(terms.dtype)
    return total / terms.shape[1]


def padded(terms: Tensor) -> Tensor:
    """Divided by the width of a block, not by K."""
    return terms.sum(1) / (1 << (terms.shape[1] - 1).bit_length())


def fwd(x, residual, weight, bias, eps, rms, dtype, variance=None, mean=mean_of, rounding=None) -> tuple[Tensor, ...]:
    """The reference, with faults in place of a row's variance, of its mean, or of xhat before the weight."""
    wide = accumulator(x.dtype)
    total = x.new_empty(0) if residual is None else (x + residual).contiguous()
    t = (x if residual is None else total).to(wide)
    mu = t.new_empty(0) if rms else mean(t)
    centred = t if rms else t - mu[:, None]
    var = mean(centred.square()) if variance is None else variance(t, centred)
    rstd = (var + eps).rsqrt()
    y = centred * rstd[:, None]
    y = y if rounding is None else y.to(rounding).to(wide)
    y = y if weight is None else y * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(dtype).contiguous(), total, mu, rstd


@_forward
def variance_as_a_difference_of_squares(x, residual, weight, bias, eps, rms, dtype):
    def variance(t, centred):
        return t.square().mean(1) if rms else (t.square().mean(1) - t.mean(1).square()).clamp_min(0)

    return fwd(x, residual, weight, bias, eps, rms, dtype, variance)


@_forward
def eps_missing(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, bias, 0.0, rms, dtype)


@_forward
def eps_added_to_the_root(x, residual, weight, bias, eps, rms, dtype):
    def variance(t, centred):
        return (centred.square().mean(1).sqrt() + eps).square() - eps

    return fwd(x, residual, weight, bias, eps, rms, dtype, variance)


@_forward
def unbiased_variance(x, residual, weight, bias, eps, rms, dtype):
    def variance(t, centred):
        return centred.square().sum(1) / max(1, t.shape[1] - 1)

    return fwd(x, residual, weight, bias, eps, rms, dtype, variance)


@_forward
def padding_counted_in_the_variance(x, residual, weight, bias, eps, rms, dtype):
    """Past K lies 0, which less the mean is not 0."""

    def variance(t, centred):
        padding = (1 << (t.shape[1] - 1).bit_length()) - t.shape[1]
        return (centred.square().sum(1) + padding * (t - centred)[:, 0].square()) / t.shape[1]

    return fwd(x, residual, weight, bias, eps, rms, dtype, variance)


@_forward
def a_row_divided_by_its_padded_length(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, bias, eps, rms, dtype, mean=padded)


@_forward
def a_row_in_one_long_chain(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, bias, eps, rms, dtype, mean=_one_chain)


@_forward
def a_row_summed_in_bf16(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, bias, eps, rms, dtype, mean=blocks_in_bf16)


@_forward
def layer_norm_for_rms_norm(x, residual, weight, bias, eps, rms, dtype):
    y, total, mean, rstd = fwd(x, residual, weight, bias, eps, False, dtype)
    return y, total, mean[:0] if rms else mean, rstd


@_forward
def statistics_of_the_unrounded_total(x, residual, weight, bias, eps, rms, dtype):
    y, total, mean, rstd = fwd(x, residual, weight, bias, eps, rms, dtype)
    if residual is not None:
        wide = accumulator(x.dtype)
        _, _, mean, rstd = fwd(x.to(wide), residual.to(wide), weight, bias, eps, rms, wide)
    return y, total, mean, rstd


@_forward
def y_of_the_unrounded_total(x, residual, weight, bias, eps, rms, dtype):
    y, total, mean, rstd = fwd(x, residual, weight, bias, eps, rms, dtype)
    if residual is not None:
        wide = accumulator(x.dtype)
        y = fwd(x.to(wide), residual.to(wide), weight, bias, eps, rms, wide)[0].to(dtype)
    return y, total, mean, rstd


@_forward
def the_residual_only_in_the_total(x, residual, weight, bias, eps, rms, dtype):
    y, total, mean, rstd = fwd(x, None, weight, bias, eps, rms, dtype)
    return y, total if residual is None else (x + residual).contiguous(), mean, rstd


@_forward
def y_rounded_to_xs_dtype_when_asked_for_fp32(x, residual, weight, bias, eps, rms, dtype):
    y, *others = fwd(x, residual, weight, bias, eps, rms, dtype)
    return y.to(x.dtype).to(dtype), *others


@_forward
def xhat_rounded_before_the_weight(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, bias, eps, rms, dtype, rounding=x.dtype)


@_forward
def a_bias_forgotten(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, None, eps, rms, dtype)


@_forward
def the_last_row_not_written(x, residual, weight, bias, eps, rms, dtype):
    y, *others = fwd(x, residual, weight, bias, eps, rms, dtype)
    out = torch.empty_like(y)
    out[:-1] = y[:-1]
    return out, *others


@_forward
def rows_that_are_not_finite_cut_off(x, residual, weight, bias, eps, rms, dtype):
    y, *others = fwd(x, residual, weight, bias, eps, rms, dtype)
    return y.nan_to_num(), *others


@_forward
def a_bias_without_a_weight_forgotten(x, residual, weight, bias, eps, rms, dtype):
    return fwd(x, residual, weight, None if weight is None and rms else bias, eps, rms, dtype)
