"""Schemas, fakes, declared temporaries, sharding and registration of nf4_linear_fwd and nf4_linear_bwd."""

from torch import Tensor

from ..._core import native
from ..._core.registry import define_op
from ..._core.sharding import REPLICATE, share
from . import reference
from .configs import MOST_ROWS

if native.HAS_TRITON:
    from .._shared import cuda_sums
    from . import triton_impl
else:
    triton_impl = None


def _fwd_fake(x, *args) -> Tensor:
    reference.check_forward(x, *args)
    return x.new_empty(x.shape[0], args[-1])


def _bwd_fake(dy, *args) -> Tensor:
    reference.check_backward(dy, *args)
    return dy.new_empty(dy.shape[0], args[-1])


def _fwd_workspace(x, *args) -> int:
    """The more of what the Triton and the CUDA kernels hold; these differ for few rows alone."""
    (M, K), (blocksize, N) = x.shape, args[-2:]
    few = cuda_sums.nf4_parts(M, N, K, blocksize, x.dtype) if M <= MOST_ROWS else 0
    return max(triton_impl.nf4_linear_fwd_workspace(x, *args), few)


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset"

nf4_linear_fwd = define_op(
    f"nf4_linear_fwd(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? addend, str quant_type, int blocksize, "
    "int N) -> Tensor",
    reference=reference.nf4_linear_fwd,
    fake=_fwd_fake,
    triton=triton_impl and triton_impl.nf4_linear_fwd,
    workspace=triton_impl and _fwd_workspace,
)

nf4_linear_bwd = define_op(
    f"nf4_linear_bwd(Tensor dy, {_WEIGHT}, Tensor? addend, str quant_type, int blocksize, int K) -> Tensor",
    reference=reference.nf4_linear_bwd,
    fake=_bwd_fake,
    triton=triton_impl and triton_impl.nf4_linear_bwd,
    workspace=triton_impl and triton_impl.nf4_linear_bwd_workspace,
)


def _by_rows(matrix, *args) -> list:
    """Rows apart; the weight whole, as its blocks need not end where a rank's part ends."""
    addend, settings = args[-4], [None] * 3
    whole = [None if tensor is None else REPLICATE for tensor in args[:-4]]
    return [([rows], [rows, *whole, None if addend is None else rows, *settings]) for rows in (REPLICATE, 0)]


share(nf4_linear_fwd, _by_rows)
share(nf4_linear_bwd, _by_rows)
