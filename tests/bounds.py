"""Derived per-element error bounds of the LoRA linear: the truth in fp64 and how far a correct kernel may be from it.

A value is carried with a bound on its error through every step that an implementation may take (`Approx`). The bound
of a step follows from the standard model fl(a op b) = (a op b)(1 + d), |d| <= u, evaluated in fp64 on absolute
values, so that products of errors (the second-order terms) are inside it and no tolerance is picked by hand.

Conventions:
  eps(t)  = torch.finfo(t).eps, the distance from 1 to the next number: 2**-7 bf16, 2**-10 fp16, 2**-23 fp32.
  u(t)    = eps(t) / 2, the unit roundoff: one rounding to nearest is wrong by at most u(t) |v| (+ eta(t)).
  eta(t)  = what a rounding may lose below the normal range: half the smallest subnormal in fp16 (F16C and every GPU
            keep fp16's subnormals); the smallest normal in the others, because vdpbf16ps, FTZ builds and
            `-ftz=true` flush subnormals to zero.
  acc(t)  = the dtype sums are carried in: fp64 for fp64, fp32 for all else.
A sum of products may be wrong by 8 eps(acc) sum|terms| = 16 u(acc) sum|terms| in any order. That is not the worst case
n u of one chain of n additions, whose errors behave as a random walk: of one sign, the partial sum i is i/n of the
whole, and a rounding error has standard deviation 0.42 u (uniform over half a unit in the last place, averaged over
the significand), so the chain's is 0.42 u sqrt(sum (i/n)^2) = 0.24 sqrt(n) u. Within six of them, 1.5 sqrt(n) u, the
16 u hold for chains of about 120 terms of one sign (far longer ones of both signs): longer sums must be cut into
partial sums. `sums_in_one_chain` grants the 1.5 sqrt(n) u instead, for a BLAS that does not cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Bounded = dict[str, tuple[Tensor, Tensor]]
"""Output name -> (truth, bound), both fp64 of the output's shape."""


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2 if dtype == torch.float16 else info.smallest_normal


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_one_chain = False


@contextmanager
def sums_in_one_chain() -> Iterator[None]:
    """Within it, bounds allow sums of any length to be one chain of additions."""
    global _one_chain
    _one_chain = True
    try:
        yield
    finally:
        _one_chain = False


def _sum_error(dtype: torch.dtype, terms: int) -> float:
    units = max(16.0, 1.5 * terms**0.5) if _one_chain else 16.0
    # The truth is a sum in fp64 too, with an error of its own: seen only where the implementation is fp64 as well.
    return units * (unit_roundoff(accumulator(dtype)) + unit_roundoff(torch.float64))


@dataclass(frozen=True)
class Approx:
    """An fp64 value and a bound on |what an implementation holds - value|, element by element."""

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(tensor: Tensor) -> "Approx":
        value = tensor.detach().to(torch.float64)
        return Approx(value, torch.zeros_like(value))

    @property
    def t(self) -> "Approx":
        return Approx(self.value.t(), self.error.t())

    @property
    def reach(self) -> Tensor:
        """The largest magnitude the implementation's value can have."""
        return self.value.abs() + self.error

    def masked(self, keep: Tensor | None) -> "Approx":
        return self if keep is None else Approx(self.value * keep, self.error * keep)

    def rounded(self, dtype: torch.dtype, gain: float = 1.0) -> "Approx":
        """Rounded to `dtype`; if that came before a multiplication by `gain`, what underflowed has grown by it."""
        return Approx(
            self.value, self.error + unit_roundoff(dtype) * self.reach + underflow(dtype) * max(1.0, abs(gain))
        )

    def scaled(self, factor: float, dtype: torch.dtype) -> "Approx":
        """Times a Python float that the kernel holds in acc(dtype): one rounding of it, one of the product."""
        value, u = self.value * factor, unit_roundoff(accumulator(dtype))
        return Approx(value, abs(factor) * (self.error + (2 * u + u * u) * self.reach))

    def plus(self, other: "Approx") -> "Approx":
        """The sum before its rounding (in the accumulator, so `rounded` or `matmul` accounts for it)."""
        return Approx(self.value + other.value, self.error + other.error)

    def matmul(self, other: "Approx", dtype: torch.dtype) -> "Approx":
        """Product with operands of `dtype`, summed in acc(dtype).

        (a + da)(b + db) - ab = a db + da b + da db; the sum's own error is relative to sum |a + da| |b + db|;
        each of the n operands, products and partial sums may be flushed to zero when subnormal.
        """
        a, b = self.reach, other.reach
        error = _sum_error(dtype, a.shape[1]) * (a @ b)
        if self.error.any():
            error += self.error @ b
        if other.error.any():
            error += self.value.abs() @ other.error
        operands = a.sum(1, keepdim=True) + b.sum(0, keepdim=True)
        error += underflow(accumulator(dtype)) * (operands + a.shape[1])
        return Approx(self.value @ other.value, error)


def keep_bits(mask: Tensor, K: int) -> Tensor | None:
    """The op's packed mask [M, ceil(K / 8)] -> fp64 0/1 [M, K], None for the empty mask; apart from the reference's."""
    if mask is None or mask.numel() == 0:
        return None
    columns = torch.arange(K, device=mask.device)
    return (mask.to(torch.int64)[:, columns // 8] // (2 ** (columns % 8)) % 2).to(torch.float64)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Approx:
    """An adapter or bias that is used in `dtype`: exact when that holds all its values, one rounding otherwise."""
    exact = Approx.exact(tensor)
    return exact if torch.promote_types(tensor.dtype, dtype) == dtype else exact.rounded(dtype)


def low_rank(x: Tensor, lora_a: Tensor, mask: Tensor | None) -> Approx:
    """s = drop(x) @ lora_a.T [M, R], rounded once to x's dtype."""
    dropped = Approx.exact(x).masked(keep_bits(mask, x.shape[1]))
    return dropped.matmul(_cast(lora_a, x.dtype).t, x.dtype).rounded(x.dtype)


def _expand(rank: Approx, factor: Approx, scaling: float, dtype: torch.dtype) -> Approx:
    """scaling * rank @ factor [M, R] @ [R, *]: the low-rank product both in y and in dx.

    Two roundings are allowed on the way, each taken by some implementation on purpose: of scaling * rank, when it
    becomes the operand of the K-extension, and of the product, when it is written before the base is added.
    """
    operand = rank.scaled(scaling, dtype).rounded(dtype, scaling)
    return operand.matmul(factor, dtype).rounded(dtype, scaling)


def _combine(base: Approx | None, delta: Approx, dtype: torch.dtype) -> Approx:
    """base + delta: the base may be rounded before delta is added (delta first or base first), then the sum is."""
    return delta.rounded(dtype) if base is None else base.rounded(dtype).plus(delta).rounded(dtype)


def forward(x, weight, lora_a, lora_b, bias, mask, scaling: float) -> Bounded:
    """Truth and bound of y [M, N] and s [M, R] for x [M, K] and the op's arguments (mask as the op returned it)."""
    dtype = x.dtype
    s = low_rank(x, lora_a, mask)
    delta = _expand(s, _cast(lora_b, dtype).t, scaling, dtype)
    base = None if weight is None else Approx.exact(x).matmul(_cast(weight, dtype).t, dtype)
    if bias is not None:
        # Delta first writes bias + delta before the base is added: a rounding of delta, counted below, and of the bias.
        row = _cast(bias, dtype).rounded(dtype)
        row = Approx(row.value.expand_as(delta.value), row.error.expand_as(delta.value))
        # Adding it to a sum in the accumulator is one rounding there.
        base = row if base is None else base.plus(row).rounded(accumulator(dtype))
    y = _combine(base, delta, dtype)
    return {"y": (y.value, y.error), "s": (s.value, s.error)}


def _adapter_gradient(left: Approx, right: Approx, scaling: float, dtype, out_dtype) -> tuple[Tensor, Tensor]:
    """scaling * left.T @ right: the product may be rounded to the activations' dtype before and after scaling."""
    product = left.t.matmul(right, dtype).rounded(dtype)
    out = product.scaled(scaling, dtype).rounded(dtype, scaling).rounded(out_dtype)
    return out.value, out.error


def backward(dy, x, weight, lora_a, lora_b, s, mask, scaling: float) -> Bounded:
    """Truth and bound of dx, dlora_a (if x is given), dlora_b and dbias.

    s is what the forward saved (then it counts as exact); None derives it from x, with the error it has there.
    """
    dtype, K = dy.dtype, lora_a.shape[1]
    keep = keep_bits(mask, K)
    grad = Approx.exact(dy)
    g = grad.matmul(_cast(lora_b, dtype), dtype).rounded(dtype)
    delta = _expand(g, _cast(lora_a, dtype), scaling, dtype).masked(keep)
    base = None if weight is None else grad.matmul(_cast(weight, dtype), dtype)
    dx = _combine(base, delta, dtype)
    out = {"dx": (dx.value, dx.error)}
    if x is not None:
        # sG is an operand of its own in the kernels that scale before the product: one more rounding of G.
        operand = g.rounded(dtype, 1 / scaling if scaling else 1.0)
        out["dlora_a"] = _adapter_gradient(operand, Approx.exact(x).masked(keep), scaling, dtype, lora_a.dtype)
    if x is not None or s is not None:
        rank = Approx.exact(s) if s is not None else low_rank(x, lora_a, mask)
        out["dlora_b"] = _adapter_gradient(grad, rank, scaling, dtype, lora_b.dtype)
    total, wide = grad.value.sum(0), accumulator(dtype)
    dbias = Approx(total, _sum_error(dtype, dy.shape[0]) * grad.value.abs().sum(0)).rounded(wide)
    out["dbias"] = (dbias.value, dbias.error)
    return out


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor, name: str) -> float:
    """Fail unless |actual - truth| <= bound everywhere; return the largest |actual - truth| / bound."""
    assert tuple(actual.shape) == tuple(truth.shape), f"{name} has shape {list(actual.shape)}, not {list(truth.shape)}"
    if actual.numel() == 0:
        return 0.0
    error = (actual.detach().to(torch.float64) - truth).abs()
    ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
    bad = ~(error <= bound)  # also true for NaN
    if bad.any():
        flat = int(torch.where(ratio.isnan(), torch.inf, ratio).argmax())
        at = [int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape)]
        raise AssertionError(
            f"{name} ({actual.dtype} {list(actual.shape)}): {int(bad.sum())} of {bad.numel()} outside the bound; "
            f"worst at {at}: got {actual.flatten()[flat].item()!r}, truth {truth.flatten()[flat].item()!r}, "
            f"off by {error.flatten()[flat].item():.3e} = {ratio.flatten()[flat].item():.3g} x the bound"
        )
    return float(ratio.max())
