"""The QLoRA linear out of the ops it is made of, forward and backward.

Notation: W [N, K] the values of the 4-bit weight in x's dtype, the rest as in the LoRA linear's reference:

    y  = x @ W.T + bias + scaling * s @ lora_b.T        (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, eq. 5)
    dx = dy @ W + scaling * drop(dy @ lora_b @ lora_a)

Many rows: W is dequantised, the LoRA linear's kernels run on it, and it is let go; the backward makes it again. Few
rows: the branch comes first, then the 4-bit linear adds its product to it in the accumulator, before the one rounding.
The ops are found by name, each has the kernel of the tensors' device, and every temporary here is a tensor that a
memory predictor sees.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import configs

Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""NF4Weight.tensors()."""


def _op(name: str) -> Callable:
    return getattr(torch.ops.peft_kernels, name).default


def _dense(weight: Weight, quant_type: str, blocksize: int, N: int, K: int, dtype: torch.dtype) -> Tensor:
    return _op("nf4_dequantize")(*weight, quant_type, blocksize, N * K, dtype).view(N, K)


def forward(
    x: Tensor,
    weight: Weight,
    quant_type: str,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, N], s [M, R] and the dropout mask, as lora_linear_fwd gives them."""
    (M, K), N = x.shape, lora_b.shape[0]
    if configs.is_dense(M):
        dense = _dense(weight, quant_type, blocksize, N, K, x.dtype)
        return _op("lora_linear_fwd")(x, dense, lora_a, lora_b, bias, seed, scaling, threshold)
    delta, s, mask = _op("lora_linear_fwd")(x, None, lora_a, lora_b, None, seed, scaling, threshold)
    return _op("nf4_linear_fwd")(x, *weight, bias, delta, quant_type, blocksize, N), s, mask


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    quant_type: str,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    mask: Tensor,
    scaling: float,
    need_dx: bool,
    need_dlora_a: bool,
    need_dlora_b: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dlora_a, dlora_b and dbias as lora_linear_bwd gives them, [0] where not needed; weight is read for dx."""
    (M, N), K = dy.shape, lora_a.shape[1]
    rest = lora_a, lora_b, s, mask, scaling, need_dx, need_dlora_a, need_dlora_b, need_dbias
    if need_dx and configs.is_dense(M):
        return _op("lora_linear_bwd")(dy, x, _dense(weight, quant_type, blocksize, N, K, dy.dtype), *rest)
    dx, *others = _op("lora_linear_bwd")(dy, x, None, *rest)
    if need_dx:
        dx = _op("nf4_linear_bwd")(dy, *weight, dx, quant_type, blocksize, K)
    return dx, *others
