"""Derived per-element error bounds of column sums: see bounds.py for the model and the conventions."""

import bounds
import torch
from torch import Tensor


def bias_grad(dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Truth and bound of dbias [N] in `dtype` for dy [M, N]: 16 u of the accumulator, and one rounding.

    Unlike the bound of a product this holds in the worst case, so for any M and any signs: in our kernels a term takes
    at most 12 roundings in fp32 before its sum moves to fp64; a partial sum is kept in fp32 (one more), and the whole
    is, on its way to 16 bits (another). Torch's own sum has no such bound; its error behaves as a random walk.
    """
    exact = dy.detach().to(torch.float64)
    carried = bounds.accumulator(dy.dtype)
    u = bounds.unit_roundoff(carried) + bounds.unit_roundoff(torch.float64)  # the truth is a sum in fp64 too
    error = 16 * u * exact.abs().sum(0) + bounds.underflow(carried)
    found = bounds.Approx(exact.sum(0), error)
    if dtype != carried:
        found = found.rounded(dtype)
    return found.value, found.error
