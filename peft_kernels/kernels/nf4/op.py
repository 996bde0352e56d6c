"""Schemas, fakes, declared temporaries, sharding and registration of the ops that quantise and dequantise."""

import torch
from torch import Tensor

from ..._core import native
from ..._core.registry import define_op
from ..._core.sharding import REPLICATE, share
from . import reference

if native.HAS_TRITON:
    from . import triton_impl
else:
    triton_impl = None


def _quantize_fake(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    reference.check_quantize(weight, quant_type, blocksize)
    numel = weight.numel()
    return (
        weight.new_empty(-(-numel // 2), dtype=torch.uint8),
        weight.new_empty(-(-numel // blocksize), dtype=torch.float32),
    )


def _scales_fake(absmax: Tensor, nested_code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_scales(absmax, nested_code)
    blocks = absmax.numel()
    return absmax.new_empty(blocks, dtype=torch.uint8), absmax.new_empty(-(-blocks // 256)), absmax.new_empty(1)


def _dequantize_fake(packed, *args) -> Tensor:
    reference.check_dequantize(packed, *args)
    *_, numel, dtype = args
    return packed.new_empty(numel, dtype=dtype)


nf4_quantize = define_op(
    "nf4_quantize(Tensor weight, str quant_type, int blocksize) -> (Tensor packed, Tensor absmax)",
    reference=reference.nf4_quantize,
    fake=_quantize_fake,
    triton=triton_impl and triton_impl.nf4_quantize,
    workspace=triton_impl and triton_impl.nf4_quantize_workspace,
)

nf4_quantize_scales = define_op(
    "nf4_quantize_scales(Tensor absmax, Tensor nested_code) "
    "-> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
    reference=reference.nf4_quantize_scales,
    fake=_scales_fake,
    triton=triton_impl and triton_impl.nf4_quantize_scales,
    workspace=lambda *_: 0,
)

nf4_dequantize = define_op(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, "
    "str quant_type, int blocksize, int numel, ScalarType dtype) -> Tensor",
    reference=reference.nf4_dequantize,
    fake=_dequantize_fake,
    triton=triton_impl and triton_impl.nf4_dequantize,
    workspace=lambda *_: 0,
)


# Blocks need not end where a rank's part ends: whole weights only.
share(nf4_quantize, lambda weight, quant_type, blocksize: [([REPLICATE] * 2, [REPLICATE, None, None])])
share(nf4_quantize_scales, lambda absmax, nested_code: [([REPLICATE] * 3, [REPLICATE] * 2)])
share(
    nf4_dequantize,
    lambda *args: [([REPLICATE], [REPLICATE if tensor is not None else None for tensor in args[:5]] + [None] * 4)],
)
