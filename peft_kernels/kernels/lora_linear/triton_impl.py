"""lora_linear_fwd and lora_linear_bwd in Triton: which kernels run for a call, and the temporaries they take."""

from torch import Tensor

from . import reference
from .configs import Config, pick_config
from .triton_launch import TL_DTYPES, arch_of, down, dy_pass, gemm, outer

_BYTES_FP32 = 4


def _config(M: int, N: int, K: int, R: int, like: Tensor) -> Config:
    return pick_config(M, N, K, R, like.dtype, arch_of(like.device))


def _splits(length: int, span: int) -> int:
    return -(-length // span)


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: arguments and results of reference.lora_linear_fwd. float64 has no Triton kernels: the reference runs."""
    if x.dtype not in TL_DTYPES:
        return reference.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, threshold)
    (M, K), N, R = x.shape, lora_b.shape[0], lora_a.shape[0]
    if M == 0 or N == 0 or K == 0:
        return reference.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, threshold)
    config = _config(M, N, K, R, x)
    bias = None if bias is None else bias.contiguous()
    s, mask = down(x, lora_a, config.down, seed, threshold)
    if weight is None:
        return gemm(None, None, s, lora_b.t(), scaling, config, bias), s, mask
    weight = weight.to(x.dtype)
    if config.path == "k_extension":
        return gemm(x, weight.t(), s, lora_b.t(), scaling, config, bias), s, mask
    y = gemm(None, None, s, lora_b.t(), scaling, config, bias)
    return y.addmm_(x, weight.t()), s, mask


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
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
    """Backward: arguments and results of reference.lora_linear_bwd. float64 has no Triton kernels: the reference runs."""
    (M, N), (R, K) = dy.shape, lora_a.shape
    needed = (need_dx, need_dlora_a, need_dlora_b, need_dbias)
    if dy.dtype not in TL_DTYPES or M == 0 or N == 0 or K == 0:
        return reference.lora_linear_bwd(dy, x, weight, lora_a, lora_b, s, mask, scaling, *needed)
    config = _config(M, N, K, R, dy)
    s = s.contiguous() if need_dlora_b else None
    need_g = need_dx or need_dlora_a
    g, dlora_b, dbias = _from_dy(dy, lora_b, s, scaling, config, need_g, need_dbias)
    dx = _dx(dy, weight, g, lora_a, mask, scaling, config) if need_dx else None
    dlora_a = None
    if need_dlora_a:
        dlora_a = outer(x, g, scaling, config.bwd_da, lora_a.new_empty(R, K), mask)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in (dx, dlora_a, dlora_b, dbias))


def _from_dy(
    dy: Tensor, lora_b: Tensor, s: Tensor | None, scaling: float, config: Config, need_g: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g, dlora_b and dbias: one read of dy, or one each where the rank is too wide for one program's registers."""
    if config.dy_passes == 1:
        if need_g or s is not None or need_dbias:
            return dy_pass(dy, lora_b, s, scaling, config.bwd_dy, need_g, need_dbias)
        return None, None, None
    g = down(dy, lora_b.t(), config.down)[0] if need_g else None
    dlora_b = None
    if s is not None:
        dlora_b = lora_b.new_empty(lora_b.shape)
        outer(dy, s, scaling, config.bwd_da, dlora_b.t())
    dbias = dy_pass(dy, lora_b, None, scaling, config.bwd_dy, False, True)[2] if need_dbias else None
    return g, dlora_b, dbias


def _dx(
    dy: Tensor, weight: Tensor | None, g: Tensor, lora_a: Tensor, mask: Tensor, scaling: float, config: Config
) -> Tensor:
    """dy @ weight + scaling * drop(g @ lora_a), by the path that the config names."""
    if weight is None:
        return gemm(None, None, g, lora_a, scaling, config, mask=mask)
    weight = weight.to(dy.dtype)
    if config.path == "k_extension":
        return gemm(dy, weight, g, lora_a, scaling, config, mask=mask)
    return gemm(None, None, g, lora_a, scaling, config, mask=mask).addmm_(dy, weight)
