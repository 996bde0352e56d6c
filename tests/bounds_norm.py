"""Derived per-element error bounds of LayerNorm and RMSNorm: see bounds.py for the model and the conventions.

u is the accumulator's unit roundoff, and fp64's besides, as the truth is made in fp64 too. What is granted:
  mean over a row   16 u mean|terms|, as bounds.py grants every sum of products: chains of at most about 120 additions
                    in fp32, so a row is summed in lanes or blocks; 2 u more for the division, which may be a product
                    with a rounded 1 / K.
  x - mean          the error d of the mean, the same for a whole row, and one rounding: where |mean| >> std, d is most
                    of it. In the variance of centred values d only counts squared, as mean(x - mean) = 0:
                    mean((c - d + r)**2) - mean(c**2) = d**2 + 2 mean((c - d) r) + mean(r**2) for c = x - mean and
                    roundings |r| <= u (|c| + d). E[x**2] - E[x]**2 is off by u mean**2, which this does not grant.
  rstd              whatever an argument in [var + eps - e, var + eps + e], never below eps, gives, and 4 u: a GPU's
                    rsqrt is within 2 ulps.
  sums over rows    16 u sum|terms| in the worst case, as bounds_sums.bias_grad; the terms' own errors beside it.
"""

from dataclasses import dataclass

import bounds
import torch
from bounds import Approx, Bounded
from torch import Tensor

_ROW_UNITS = 16 + 2
_RSQRT_UNITS = 4


def _u(dtype: torch.dtype) -> float:
    return bounds.unit_roundoff(bounds.accumulator(dtype)) + bounds.unit_roundoff(torch.float64)


def _computed(value: Tensor, error: Tensor, dtype: torch.dtype) -> Approx:
    """The result of one operation in the accumulator: its operands' errors have come to `error`."""
    lost = bounds.underflow(bounds.accumulator(dtype))
    return Approx(value, error + _u(dtype) * (value.abs() + error) + lost)


def _times(a: Approx, b: Approx, dtype: torch.dtype) -> Approx:
    error = a.error * b.value.abs() + a.value.abs() * b.error + a.error * b.error
    # An operand that was flushed to zero takes its product with it.
    error = error + bounds.underflow(bounds.accumulator(dtype)) * (a.value.abs() + b.value.abs())
    return _computed(a.value * b.value, error, dtype)


def _row_mean(terms: Approx, dtype: torch.dtype) -> Approx:
    error = terms.error + _ROW_UNITS * _u(dtype) * terms.reach
    lost = 2 * bounds.underflow(bounds.accumulator(dtype))
    return Approx(terms.value.mean(1, keepdim=True), error.mean(1, keepdim=True) + lost)


def _out(found: Approx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the accumulator holds, as an output of `dtype`."""
    found = found if dtype in (torch.float32, torch.float64) else found.rounded(dtype)
    return found.value, found.error


def _row(weight: Tensor, dtype: torch.dtype) -> Approx:
    """A weight or bias [K] in the accumulator's dtype."""
    wide = bounds.accumulator(dtype)
    exact = Approx.exact(weight[None])
    return exact if torch.promote_types(weight.dtype, wide) == wide else exact.rounded(wide)


@dataclass(frozen=True)
class Statistics:
    """mean (None: RMSNorm) and rstd, [M, 1]."""

    mean: Approx | None
    rstd: Approx

    @staticmethod
    def given(mean: Tensor | None, rstd: Tensor) -> "Statistics":
        """As they came, exact."""
        return Statistics(None if mean is None else Approx.exact(mean[:, None]), Approx.exact(rstd[:, None]))


def _centred(x: Tensor, mean: Approx | None, dtype: torch.dtype) -> Approx:
    exact = Approx.exact(x)
    if mean is None:
        return exact
    value = exact.value - mean.value
    return Approx(value, mean.error + _u(dtype) * (value.abs() + mean.error))


def statistics(x: Tensor, eps: float, rms: bool) -> Statistics:
    """Of x [M, K], which is what was normalised: the rounded total, where there is a residual."""
    u, exact = _u(x.dtype), Approx.exact(x)
    mean = None if rms else _row_mean(exact, x.dtype)
    d = torch.zeros_like(exact.value[:, :1]) if rms else mean.error
    c = exact.value if rms else exact.value - mean.value
    var = c.square().mean(1, keepdim=True)
    reach = (c.abs() + d).square().mean(1, keepdim=True)
    # The truth's own mean is off as well; then 2 u for the roundings r, one for the square, and the sum's.
    own = _ROW_UNITS * bounds.unit_roundoff(torch.float64) * exact.value.abs().mean(1, keepdim=True)
    error = d * d + 2 * d * (0.0 if rms else own) + (_ROW_UNITS + 4) * u * reach
    error = error + 2 * bounds.underflow(bounds.accumulator(x.dtype))
    v = var + eps
    error = error + u * (v + error) + u * eps
    low, high = (v - error).clamp_min(eps * (1 - 3 * u)), v + error
    rstd = v.rsqrt()
    spread = torch.maximum(low.rsqrt() - rstd, rstd - high.rsqrt()) + _RSQRT_UNITS * u * low.rsqrt()
    return Statistics(mean, Approx(rstd, spread))


def total(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Truth and bound of x + residual in their dtype: 16-bit numbers may be added in fp32 first."""
    found = Approx.exact(x).plus(Approx.exact(residual)).rounded(bounds.accumulator(x.dtype))
    return _out(found, x.dtype)


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, dtype) -> Bounded:
    """Truth and bound of y in `dtype`, rstd and (but for RMSNorm) mean, for what was normalised, x."""
    found = statistics(x, eps, rms)
    y = _times(_centred(x, found.mean, x.dtype), found.rstd, x.dtype)
    if weight is not None:
        y = _times(y, _row(weight, x.dtype), x.dtype)
    if bias is not None:
        y = y.plus(_row(bias, x.dtype))
        y = _computed(y.value, y.error, x.dtype)
    out = {"y": _out(y, dtype), "rstd": (found.rstd.value[:, 0], found.rstd.error[:, 0])}
    if not rms:
        out["mean"] = found.mean.value[:, 0], found.mean.error[:, 0]
    return out


def _dx(g: Approx, xhat: Approx, rstd: Approx, rms: bool, dtype: torch.dtype) -> Approx:
    third = _times(xhat, _row_mean(_times(g, xhat, dtype), dtype), dtype)
    value, error, reach = g.value - third.value, g.error + third.error, g.reach + third.reach
    if not rms:
        mean = _row_mean(g, dtype)
        value, error, reach = value - mean.value, error + mean.error, reach + mean.reach
    # Three operands in any order, before or after rstd multiplies each: three roundings of what they may add up to.
    return _times(Approx(value, error + 3 * _u(dtype) * reach), rstd, dtype)


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, found: Statistics, weight: Tensor | None, rms: bool, dtype, dx_dtype
) -> Bounded:  # fmt: skip
    """Truth and bound of dx in dx_dtype, dweight and dbias in `dtype`, for the statistics `found`."""
    grad = Approx.exact(dy)
    xhat = _times(_centred(x, found.mean, dx_dtype), found.rstd, dx_dtype)
    g = grad if weight is None else _times(grad, _row(weight, dx_dtype), dx_dtype)
    dx = _dx(g, xhat, found.rstd, rms, dx_dtype)
    if dtotal is not None:
        dx = dx.plus(Approx.exact(dtotal))
        dx = _computed(dx.value, dx.error, dx_dtype)
    out = {"dx": _out(dx, dx_dtype)}
    lost = bounds.underflow(bounds.accumulator(dx_dtype))
    for name, terms in (("dweight", _times(grad, xhat, dx_dtype)), ("dbias", grad)):
        error = terms.error.sum(0) + 16 * _u(dx_dtype) * terms.reach.sum(0) + lost
        out[name] = _out(Approx(terms.value.sum(0), error), dtype)
    return out
