"""The 4-bit linear's maths in plain PyTorch.

Notation: W [N, K] are the values of the 4-bit weight in x's dtype (formats.nf4_values), x [M, K].

    y  = x @ W.T + bias + addend
    dx = dy @ W + addend

The addend, of the result's shape and dtype, is added before the one rounding: the QLoRA linear hands its low-rank
branch over in it, which added to a 16-bit base afterwards would mostly round away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formats import nf4_values
from ...formats.nf4 import check_tensors

_NAME = "nf4_linear"


def _check(matrix: Tensor, name: str, weight: Sequence, quant_type: str, blocksize: int, other: int) -> None:
    """Raise ValueError unless the rows of `matrix` fit a weight of its columns times `other`."""
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"{_NAME}: {name} is {matrix.dtype} {list(matrix.shape)}; expected a floating matrix")
    check_tensors(_NAME, *weight, quant_type, blocksize, matrix.shape[1] * other)


def _check_addend(addend: Tensor | None, like: Tensor, columns: int) -> None:
    expected = like.shape[0], columns
    if addend is not None and (addend.shape != expected or addend.dtype != like.dtype):
        raise ValueError(
            f"{_NAME}: addend is {addend.dtype} {list(addend.shape)}; expected {like.dtype} {list(expected)}"
        )


def check_forward(x: Tensor, *args) -> None:
    """Raise ValueError unless the arguments of nf4_linear_fwd fit."""
    *weight, bias, addend, quant_type, blocksize, N = args
    _check(x, "x", weight, quant_type, blocksize, N)
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"{_NAME}: bias has shape {list(bias.shape)}; expected [{N}]")
    _check_addend(addend, x, N)


def check_backward(dy: Tensor, *args) -> None:
    """Raise ValueError unless the arguments of nf4_linear_bwd fit."""
    *weight, addend, quant_type, blocksize, K = args
    _check(dy, "dy", weight, quant_type, blocksize, K)
    _check_addend(addend, dy, K)


def nf4_linear_fwd(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    quant_type: str,
    blocksize: int,
    N: int,
) -> Tensor:
    """x [M, K], addend [M, N], any strides; bias [N] of any floating dtype -> y [M, N] in x's dtype."""
    tensors = packed, absmax, nested_absmax, nested_code, nested_offset
    check_forward(x, *tensors, bias, addend, quant_type, blocksize, N)
    K = x.shape[1]
    weight = nf4_values.dequantize(*tensors, quant_type, blocksize, N * K, x.dtype).view(N, K)
    bias = None if bias is None else bias.to(x.dtype)
    if addend is None:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.addmm(addend if bias is None else addend + bias, x, weight.t())


def nf4_linear_bwd(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    addend: Tensor | None,
    quant_type: str,
    blocksize: int,
    K: int,
) -> Tensor:
    """dy [M, N], addend [M, K], any strides -> dx [M, K] in dy's dtype."""
    tensors = packed, absmax, nested_absmax, nested_code, nested_offset
    check_backward(dy, *tensors, addend, quant_type, blocksize, K)
    N = dy.shape[1]
    weight = nf4_values.dequantize(*tensors, quant_type, blocksize, N * K, dy.dtype).view(N, K)
    return dy @ weight if addend is None else torch.addmm(addend, dy, weight)
