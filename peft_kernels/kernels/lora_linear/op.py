"""Schemas, fakes, declared temporaries and registration of lora_linear_fwd and lora_linear_bwd."""

import torch
from torch import Tensor

from ..._core import native
from ..._core.registry import OWNERS, define_op
from ..._core.sharding import share
from . import reference, sharding

if native.HAS_TRITON:
    from . import triton_impl
else:
    triton_impl = None


def _fwd_fake(x, weight, lora_a, lora_b, bias, seed, scaling, threshold):
    M, K = x.shape
    mask_shape = (0,) if seed is None else (M, (K + 7) // 8)
    return (
        x.new_empty(M, lora_b.shape[0]),
        x.new_empty(M, lora_a.shape[0]),
        x.new_empty(mask_shape, dtype=torch.uint8),
    )


def _bwd_fake(dy, x, weight, lora_a, lora_b, s, mask, scaling, need_dx, need_dlora_a, need_dlora_b, need_dbias):
    def out(needed: bool, shape: tuple, dtype: torch.dtype) -> Tensor:
        return dy.new_empty(shape if needed else (0,), dtype=dtype if needed else dy.dtype)

    return (
        out(need_dx, (dy.shape[0], lora_a.shape[1]), dy.dtype),
        out(need_dlora_a, tuple(lora_a.shape), lora_a.dtype),
        out(need_dlora_b, tuple(lora_b.shape), lora_b.dtype),
        out(need_dbias, (dy.shape[1],), torch.promote_types(dy.dtype, torch.float32)),
    )


lora_linear_fwd = define_op(
    "lora_linear_fwd(Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "float scaling, int threshold) -> (Tensor y, Tensor s, Tensor mask)",
    reference=reference.lora_linear_fwd,
    fake=_fwd_fake,
    triton=triton_impl and triton_impl.lora_linear_fwd,
    workspace=triton_impl and triton_impl.lora_linear_fwd_workspace,
)

lora_linear_bwd = define_op(
    "lora_linear_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? s, Tensor mask, "
    "float scaling, bool need_dx, bool need_dlora_a, bool need_dlora_b, bool need_dbias) "
    "-> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dbias)",
    reference=reference.lora_linear_bwd,
    fake=_bwd_fake,
    triton=triton_impl and triton_impl.lora_linear_bwd,
    workspace=triton_impl and triton_impl.lora_linear_bwd_workspace,
)


def general_because(x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, dropout: bool) -> str:
    """Why a call with rows like x's goes past the CUDA extension's kernels; "" where it does not, or there are none."""
    if x.device.type != "cuda" or OWNERS["lora_linear_fwd", "CUDA"] != "native":
        return ""
    return torch.ops.peft_kernels.lora_linear_refusal(x, weight, lora_a, lora_b, dropout)


share(lora_linear_fwd, sharding.lora_linear_fwd)
share(lora_linear_bwd, sharding.lora_linear_bwd)
