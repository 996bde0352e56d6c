"""Schemas, fakes, declared temporaries, sharding and registration of norm_fwd and norm_bwd."""

import torch
from torch import Tensor

from ..._core import native
from ..._core.dtypes import accumulator
from ..._core.registry import define_op
from ..._core.sharding import share
from . import reference, sharding

if native.HAS_TRITON:
    from .._shared import cuda_sums
    from . import triton_impl
else:
    triton_impl = None


def _fwd_fake(x, residual, weight, bias, eps, rms, dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference.check_fwd(x, residual, weight, bias, dtype)
    M, wide = x.shape[0], accumulator(x.dtype)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(0 if rms else M, dtype=wide),
        x.new_empty(M, dtype=wide),
    )


def _bwd_fake(
    dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    reference.check_bwd(dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype)

    def out(needed: bool, shape: torch.Size, kind: torch.dtype) -> Tensor:
        return dy.new_empty(shape if needed else (0,), dtype=kind)

    return (
        out(need_dx, dy.shape, dx_dtype),
        out(need_dweight, dy.shape[1:], dtype),
        out(need_dbias, dy.shape[1:], dtype),
    )


def _bwd_workspace(dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, *dtypes) -> int:
    """The more of what the Triton and the CUDA kernels hold."""
    arguments = dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, *dtypes
    kept = dy if x is None else x
    by_cuda = cuda_sums.norm_sums(*dy.shape, need_dweight + need_dbias, kept.dtype)
    return max(triton_impl.norm_bwd_workspace(*arguments), by_cuda)


norm_fwd = define_op(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType dtype) "
    "-> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    reference=reference.norm_fwd,
    fake=_fwd_fake,
    triton=triton_impl and triton_impl.norm_fwd,
    workspace=triton_impl and triton_impl.norm_fwd_workspace,
)

norm_bwd = define_op(
    "norm_bwd(Tensor dy, Tensor? dtotal, Tensor? x, Tensor? mean, Tensor? rstd, Tensor? weight, bool rms, "
    "bool need_dx, bool need_dweight, bool need_dbias, ScalarType dtype, ScalarType dx_dtype) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=reference.norm_bwd,
    fake=_bwd_fake,
    triton=triton_impl and triton_impl.norm_bwd,
    workspace=triton_impl and _bwd_workspace,
)

share(norm_fwd, sharding.norm_fwd)
share(norm_bwd, sharding.norm_bwd)
