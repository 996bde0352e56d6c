"""Derived per-element error bounds of the 4-bit linear: see bounds.py for the model and the conventions.

The weight of the truth is what its bytes are worth: level * scale in fp32, which is exact by definition of the format.
What is granted: one rounding of W to x's dtype where that has 16 bits (a kernel may also keep W in fp32, which is
within it), the sum of products in the accumulator as in bounds.py, and one rounding of the sum. A bias is used in x's
dtype or wider; beside an addend the two may be added first, in x's dtype. Bias and addend join the sum with one
rounding each in the accumulator. `factors` is a dtype that the user let both factors of an fp32 product be rounded to.
"""

import numpy as np
import torch
from bounds import Approx, accumulator, unit_roundoff
from torch import Tensor

from peft_kernels.formats.nf4 import LEVELS, NF4Weight


def values(weight: NF4Weight) -> Tensor:
    """fp64 [N, K], exact; made apart from the reference, with numpy."""
    packed, absmax, nested_absmax, nested_code, nested_offset = (
        None if t is None else t.detach().cpu().numpy() for t in weight.tensors()
    )
    if nested_absmax is not None:  # fp32 throughout: a product and a sum, each rounded
        product = nested_code[absmax] * np.repeat(nested_absmax, 256)[: absmax.size]
        absmax = (product + nested_offset).astype(np.float32)
    codes = np.empty(2 * packed.size, dtype=np.uint8)
    codes[0::2], codes[1::2] = packed >> 4, packed & 15
    level = np.array(LEVELS[weight.quant_type], dtype=np.float32)[codes[: weight.numel]]
    scaled = level * np.repeat(absmax, weight.blocksize)[: weight.numel]
    assert scaled.dtype == np.float32
    return torch.from_numpy(scaled.astype(np.float64)).view(weight.shape)


def _weight(weight: NF4Weight, dtype: torch.dtype, device: torch.device) -> Approx:
    exact = Approx.exact(values(weight).to(device))
    return exact.rounded(dtype) if dtype.itemsize == 2 else exact


def _finished(product: Approx, bias: Tensor | None, addend: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide, beside = accumulator(dtype), None
    if bias is not None:
        row = Approx.exact(bias)
        row = row if torch.promote_types(bias.dtype, dtype) == dtype else row.rounded(dtype)
        beside = Approx(row.value.expand_as(product.value), row.error.expand_as(product.value))
    if addend is not None:
        added = Approx.exact(addend)
        both = None if beside is None else beside.plus(added).rounded(dtype)
        if both is not None:
            # Or one after the other: the first sum's rounding is of what it is then, however small the last sum.
            first = torch.maximum(product.plus(beside).reach, product.plus(added).reach)
            both = Approx(both.value, both.error + unit_roundoff(wide) * first)
        beside = added if both is None else both
    if beside is not None:
        product = product.plus(beside).rounded(wide).rounded(wide)
    found = product if dtype == wide else product.rounded(dtype)
    return found.value, found.error


def _product(left: Tensor, weight: NF4Weight, transposed: bool, factors: torch.dtype | None) -> Approx:
    right, exact = _weight(weight, factors or left.dtype, left.device), Approx.exact(left)
    return (exact.rounded(factors) if factors else exact).matmul(right.t if transposed else right, left.dtype)


def forward(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, addend: Tensor | None, factors: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Truth and bound of y [M, N] = x @ W.T + bias + addend."""
    return _finished(_product(x, weight, True, factors), bias, addend, x.dtype)


def backward(
    dy: Tensor, weight: NF4Weight, addend: Tensor | None, factors: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Truth and bound of dx [M, K] = dy @ W + addend."""
    return _finished(_product(dy, weight, False, factors), None, addend, dy.dtype)
