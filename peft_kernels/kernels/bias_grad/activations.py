"""The activation pass's maths: y = act(z) with a 1-bit mask for ReLU, dz = dy * act'(z) with dbias, in plain PyTorch.

    relu       max(z, 0)                                            act' = 1 where not z <= 0
    gelu       z Phi(z)                                             Phi(z) + z phi(z)
    gelu_tanh  z s(v), v = 2 sqrt(2 / pi) (z + 0.044715 z**3)       s(v) + z v'(z) s(v) s(-v)
    silu       z s(z)                                               s(z) + z s(z) s(-z)

Phi and phi are the normal distribution and its density, s the sigmoid; 0.5 (1 + tanh(u)) = s(2 u). (GELU: Hendrycks and
Gimpel 2016, arXiv 1606.08415.)
"""

import math

import torch
from torch import Tensor

from ..._core.dtypes import accumulator

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

TANH_SCALE = 2 * math.sqrt(2 / math.pi)
TANH_CUBE = 0.044715


def check_activation(function: str, activation: str, besides: str = "") -> None:
    """Raise ValueError unless it is one of the four; besides: what else the function takes."""
    if activation not in ACTIVATIONS:
        expected = f"{besides}one of {', '.join(ACTIVATIONS)}"
        raise ValueError(f"{function}: activation is {activation!r}; expected {expected}")


def check_relu(z: Tensor) -> None:
    """Raise ValueError unless z is [M, N], floating."""
    if z.dim() != 2:
        raise ValueError(f"relu_fwd: z has shape {list(z.shape)}; expected two dimensions, [M, N]")
    if not z.dtype.is_floating_point:
        raise ValueError(f"relu_fwd: z is {z.dtype}; expected a floating dtype")


def check(dy: Tensor, kept: Tensor, activation: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the arguments of act_bwd fit each other."""
    check_activation("act_bwd", activation)
    if not dy.is_floating_point():
        raise ValueError(f"act_bwd: dy is {dy.dtype}; expected a floating dtype")
    if dy.dim() != 2:
        raise ValueError(f"act_bwd: dy has shape {list(dy.shape)}; expected two dimensions, [M, N]")
    M, N = dy.shape
    kind, columns, what = (torch.uint8, -(-N // 8), "the mask") if activation == "relu" else (dy.dtype, N, "z")
    if kept.dim() != 2 or kept.shape[0] != M or kept.shape[1] != columns:
        raise ValueError(f"act_bwd: kept has shape {list(kept.shape)}; expected {[M, columns]}, {what} of dy {[M, N]}")
    if kept.dtype != kind:
        raise ValueError(f"act_bwd: kept is {kept.dtype}; expected {kind}, {what} for {activation}")
    if kept.device != dy.device:
        raise ValueError(f"act_bwd: kept is on {kept.device}; expected {dy.device}, as dy")
    if dtype not in (dy.dtype, accumulator(dy.dtype)):
        raise ValueError(f"act_bwd: dtype is {dtype}; expected {dy.dtype} as dy, or {accumulator(dy.dtype)}")


def relu_fwd(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [M, N], any strides -> y [M, N] contiguous and the mask of what passes, NaN too: uint8 [M, ceil(N / 8)].

    Bit j (lowest first) of byte b is column 8 b + j; bits past N are 0.
    """
    check_relu(z)
    stopped = z <= 0
    bits = torch.nn.functional.pad(~stopped, (0, -z.shape[1] % 8)).unflatten(1, (-1, 8))
    mask = (bits << torch.arange(8, dtype=torch.uint8, device=z.device)).sum(2, dtype=torch.uint8)
    return torch.where(stopped, 0, z).contiguous(), mask


def _passes(mask: Tensor, N: int) -> Tensor:
    """The packed mask -> bool [M, N]."""
    bits = mask.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).flatten(1)[:, :N].bool()


def derivative(z: Tensor, activation: str) -> Tensor:
    """act'(z) in z's dtype, fp32 or fp64, for all but ReLU; 0 and 1 at the infinities, NaN for NaN."""
    if activation == "gelu":
        level = 0.5 * torch.erfc(-math.sqrt(0.5) * z)
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        slope = z * density
    else:
        tanh = activation == "gelu_tanh"
        v = TANH_SCALE * z * (1 + TANH_CUBE * z * z) if tanh else z
        level = torch.sigmoid(v)
        density = level * torch.sigmoid(-v)
        slope = z * density * (TANH_SCALE * (1 + 3 * TANH_CUBE * z * z) if tanh else 1)
    # Where the density is 0, z may be infinite; a NaN shows in `level`.
    return level + torch.where(density > 0, slope, 0)


def act_bwd(
    dy: Tensor, kept: Tensor, activation: str, need_dz: bool, need_dbias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dz = dy * act'(z) [M, N] in dy's dtype, contiguous, and dbias [N] in `dtype`: the column sums of dz unrounded.

    Args:
        dy: [M, N], any strides.
        kept: z [M, N] of dy's dtype, any strides; for "relu" the mask of relu_fwd.
        dtype: dy's own, or float32 (float64 for fp64): products and sums are made in that, and rounded once.

    What is not needed is empty.
    """
    check(dy, kept, activation, dtype)
    carried = accumulator(dy.dtype)
    grad = dy.to(carried)
    if activation == "relu":
        product = torch.where(_passes(kept, dy.shape[1]), grad, 0)
    else:
        product = grad * derivative(kept.to(carried), activation)
    dz = product.to(dy.dtype).contiguous() if need_dz else dy.new_empty(0)
    return dz, product.sum(0).to(dtype) if need_dbias else dy.new_empty(0, dtype=dtype)
