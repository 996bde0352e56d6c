"""The bias gradient's maths: dbias = the column sums of dy, in plain PyTorch.

For y = x @ weight.T + bias, the gradient of the bias is the sum of dy over its rows; in a model whose biases alone
train (BitFit, Ben Zaken et al. 2021, arXiv 2106.10199) it is the only parameter gradient there is.
"""

import torch
from torch import Tensor

from ..._core.dtypes import accumulator


def check(dy: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless dy is [M, N], floating, and `dtype` its own or its accumulator's."""
    if not dy.is_floating_point():
        raise ValueError(f"bias_grad: dy is {dy.dtype}; expected a floating dtype")
    if dy.dim() != 2:
        raise ValueError(f"bias_grad: dy has shape {list(dy.shape)}; expected two dimensions, [M, N]")
    if dtype not in (dy.dtype, accumulator(dy.dtype)):
        raise ValueError(f"bias_grad: dtype is {dtype}; expected {dy.dtype} as dy, or {accumulator(dy.dtype)}")


def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [M, N], any strides -> dbias [N] in `dtype`: summed in fp32 (fp64 for fp64), rounded once; zeros where M is 0.

    `dtype` is dy's own, or float32 (float64 for fp64).
    """
    check(dy, dtype)
    return dy.sum(0, dtype=accumulator(dy.dtype)).to(dtype)
