"""Derived per-element error bounds of the activation pass: see bounds.py for the model and the conventions.

All three smooth activations have a derivative level(z) + slope(z): level goes from 0 to 1, slope = z v' density is
the rest, and below z = 0 the two cancel. So the error is counted with the magnitudes of both, each of which a kernel
can have to a relative error: level through exp or erfc, never as 0.5 + 0.5 erf(z), which is off by a unit of 0.5 where
level is 1e-7. Since act'(z) + act'(-z) = 1, a kernel may make g = act'(-|z|) and subtract it from 1: that errs by the
same terms, and by u.

Of u = u(acc), what one of the two terms may be off by, relative to itself:
  argument  what rounding does to exp's argument t grows by |t|: exp(t (1 + d)) = exp(t) exp(t d). Two roundings are
            exp's that is made of exp2: the constant log2 e and the product. silu's t is z. gelu's t = z z / 2 has one
            for the square or, as erfc(z sqrt(1/2)), two for the constant and the product, which weigh twice, as t goes
            with the square: 4 at most. gelu_tanh's t = A z (1 + B z z): 1 for the square, 2 for B and its product, 1
            for the sum, 2 for A and its product, 1 for the last product: 7.
  exp       4: 2 ulp, CUDA's and Triton's approximations on every part.
  rest      12: 4 for a division or two, each at most 2 ulp wrong; 6 for a polynomial in erfc's place, or an erfc wrong
            by 3 ulp; 2 for the products. gelu_tanh's v' is a sum of positive terms, with one of 4 in place of the 6.
Of e, below the smallest normal, nothing may be left (flushed to zero), in level and in slope's factor.
The product with dy is rounded once in acc; dz once more if its dtype is narrower. dbias sums the products as they are.
"""

import math

import bounds
import torch
from bounds import Approx
from torch import Tensor

ARGUMENT = {"silu": 2, "gelu": 2 + 4, "gelu_tanh": 2 + 7}
"""Roundings that exp's argument takes."""

_REST = 4 + 12
_A, _B = 2 * math.sqrt(2 / math.pi), 0.044715


def parts(z: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(level, density, slope's factor before the density, exp's argument) at fp64 z, none of them infinite."""
    if activation == "gelu":
        t = 0.5 * z * z  # torch.special.ndtr is off by 2 % at -8
        return 0.5 * torch.erfc(-math.sqrt(0.5) * z), torch.exp(-t) / math.sqrt(2 * math.pi), z, t
    t, rise = (_A * z * (1 + _B * z * z), _A * (1 + 3 * _B * z * z)) if activation == "gelu_tanh" else (z, 1)
    return torch.sigmoid(t), torch.sigmoid(t) * torch.sigmoid(-t), z * rise, t.abs()


def derivative(z: Tensor, activation: str, carried: torch.dtype) -> Approx:
    """act'(z) of finite z in fp64, with what a kernel that computes in `carried` may be off by before any product."""
    # Beyond 1024 every term is 0 or 1 to the last bit of fp64's smallest number; here squares of z stay finite.
    z = z.detach().to(torch.float64).clamp(-1024, 1024)
    level, density, factor, argument = parts(z, activation)
    u = bounds.unit_roundoff(carried) + bounds.unit_roundoff(torch.float64)  # the truth is rounded in fp64 too
    relative = torch.expm1((ARGUMENT[activation] * argument.clamp(max=1024) + _REST) * u)
    slope = factor * density
    error = relative * (level + slope.abs()) + bounds.underflow(carried) * (1 + factor.abs())
    return Approx(level + slope, error)


def products(dy: Tensor, kept: Tensor, activation: str) -> Approx:
    """dy * act'(z) [M, N] as the sums take them; for ReLU, whose products are exact, by the mask's bits."""
    exact = dy.detach().to(torch.float64)
    if activation == "relu":
        keep = bounds.keep_bits(kept, dy.shape[1])
        return Approx.exact(exact * keep if keep is not None else exact)
    carried = bounds.accumulator(dy.dtype)
    slope = derivative(kept, activation, carried)
    product = Approx(exact * slope.value, exact.abs() * slope.error)
    return product.rounded(carried)


def act_bwd(dy: Tensor, kept: Tensor, activation: str, dtype: torch.dtype) -> bounds.Bounded:
    """Truth and bound of dz [M, N], and of dbias [N] in `dtype`: as bias_grad's, 16 u and one rounding."""
    product, carried = products(dy, kept, activation), bounds.accumulator(dy.dtype)
    u = bounds.unit_roundoff(carried) + bounds.unit_roundoff(torch.float64)
    error = product.error.sum(0) + 16 * u * product.reach.sum(0) + bounds.underflow(carried)
    dbias = Approx(product.value.sum(0), error)
    dz = product if dy.dtype == carried or activation == "relu" else product.rounded(dy.dtype)
    dbias = dbias if dtype == carried else dbias.rounded(dtype)
    return {"dz": (dz.value, dz.error), "dbias": (dbias.value, dbias.error)}
