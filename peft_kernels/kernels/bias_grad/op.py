"""Schemas, fakes, declared temporaries, sharding and registration of bias_grad, relu_fwd and act_bwd."""

import torch
from torch import Tensor

from ..._core import native
from ..._core.registry import define_op
from ..._core.sharding import PARTIAL, REPLICATE, share
from . import activations, reference

if native.HAS_TRITON:
    from .._shared import cuda_sums
    from . import triton_act, triton_impl
else:
    triton_act = triton_impl = None


def _fake(dy: Tensor, dtype: torch.dtype) -> Tensor:
    reference.check(dy, dtype)
    return dy.new_empty(dy.shape[1], dtype=dtype)


def _relu_fake(z: Tensor) -> tuple[Tensor, Tensor]:
    activations.check_relu(z)
    M, N = z.shape
    return z.new_empty(M, N), z.new_empty(M, (N + 7) // 8, dtype=torch.uint8)


def _act_fake(dy, kept, activation, need_dz, need_dbias, dtype) -> tuple[Tensor, Tensor]:
    activations.check(dy, kept, activation, dtype)
    M, N = dy.shape
    return dy.new_empty((M, N) if need_dz else (0,)), dy.new_empty(N if need_dbias else 0, dtype=dtype)


def _workspace(dy: Tensor, dtype: torch.dtype) -> int:
    """The more of what the Triton and the CUDA kernels hold."""
    return max(triton_impl.bias_grad_workspace(dy, dtype), cuda_sums.column_sums(*dy.shape, dy.dtype))


def _act_workspace(dy, kept, activation, need_dz, need_dbias, dtype) -> int:
    by_cuda = cuda_sums.column_sums(*dy.shape, dy.dtype) if need_dbias else 0
    return max(triton_act.act_bwd_workspace(dy, kept, activation, need_dz, need_dbias, dtype), by_cuda)


bias_grad = define_op(
    "bias_grad(Tensor dy, ScalarType dtype) -> Tensor",
    reference=reference.bias_grad,
    fake=_fake,
    triton=triton_impl and triton_impl.bias_grad,
    workspace=triton_impl and _workspace,
)

relu_fwd = define_op(
    "relu_fwd(Tensor z) -> (Tensor y, Tensor mask)",
    reference=activations.relu_fwd,
    fake=_relu_fake,
    triton=triton_act and triton_act.relu_fwd,
)

act_bwd = define_op(
    "act_bwd(Tensor dy, Tensor kept, str activation, bool need_dz, bool need_dbias, ScalarType dtype) "
    "-> (Tensor dz, Tensor dbias)",
    reference=activations.act_bwd,
    fake=_act_fake,
    triton=triton_act and triton_act.act_bwd,
    workspace=triton_act and _act_workspace,
)


def _sharding(dy: Tensor, dtype: torch.dtype) -> list:
    """Rows of dy apart are partial sums, columns apart are columns of dbias."""
    return [([out], [placement, None]) for out, placement in ((REPLICATE, REPLICATE), (PARTIAL, 0), (0, 1))]


def _relu_sharding(z: Tensor) -> list:
    """Rows apart. Columns apart would need a multiple of 8 of them on every rank, as they share bytes of the mask."""
    return [([placement, placement], [placement]) for placement in (REPLICATE, 0)]


def _act_sharding(dy, kept, activation, need_dz, need_dbias, dtype) -> list:
    """As bias_grad's, dz as dy; what is not needed is empty everywhere. ReLU's columns cannot be apart."""
    allowed = ((REPLICATE, REPLICATE), (0, PARTIAL), (1, 0))[: 2 if activation == "relu" else 3]
    return [
        ([rows if need_dz else REPLICATE, sums if need_dbias else REPLICATE], [rows, rows, None, None, None, None])
        for rows, sums in allowed
    ]


share(bias_grad, _sharding)
share(relu_fwd, _relu_sharding)
share(act_bwd, _act_sharding)
