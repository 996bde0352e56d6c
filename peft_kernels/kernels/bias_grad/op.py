"""Schema, fake, declared temporaries, sharding and registration of bias_grad."""

import torch
from torch import Tensor

from ..._core import native
from ..._core.registry import define_op
from ..._core.sharding import PARTIAL, REPLICATE, share
from . import reference

if native.HAS_TRITON:
    from . import triton_impl
else:
    triton_impl = None


def _fake(dy: Tensor, dtype: torch.dtype) -> Tensor:
    reference.check(dy, dtype)
    return dy.new_empty(dy.shape[1], dtype=dtype)


bias_grad = define_op(
    "bias_grad(Tensor dy, ScalarType dtype) -> Tensor",
    reference=reference.bias_grad,
    fake=_fake,
    triton=triton_impl and triton_impl.bias_grad,
    workspace=triton_impl and triton_impl.bias_grad_workspace,
)


def _sharding(dy: Tensor, dtype: torch.dtype) -> list:
    """Rows of dy apart are partial sums, columns apart are columns of dbias."""
    return [([out], [placement, None]) for out, placement in ((REPLICATE, REPLICATE), (PARTIAL, 0), (0, 1))]


share(bias_grad, _sharding)
