"""lora_linear_fwd and lora_linear_bwd in Triton: which kernels run for a call, and the temporaries they take."""

from torch import Tensor

from .._shared.launch import arch_of
from . import reference
from .configs import Config, pick_config
from .triton_launch import TL_DTYPES, down, dy_pass, gemm, outer


def _config(M: int, N: int, K: int, R: int, like: Tensor, dropout: bool) -> Config:
    return pick_config(M, N, K, R, like.dtype, arch_of(like.device), dropout)


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
    """Forward: arguments and results of reference.lora_linear_fwd.

    The kernels own fp32, bf16 and fp16 activations; float64 has none and runs the reference, on any device.
    """
    if x.dtype not in TL_DTYPES:
        return reference.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, threshold)
    (M, K), N, R = x.shape, lora_b.shape[0], lora_a.shape[0]
    if M == 0 or N == 0 or K == 0:
        return reference.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, threshold)
    config = _config(M, N, K, R, x, seed is not None)
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
    """Backward: arguments and results of reference.lora_linear_bwd; float64 runs the reference, as in the forward."""
    (M, N), (R, K) = dy.shape, lora_a.shape
    needed = (need_dx, need_dlora_a, need_dlora_b, need_dbias)
    if dy.dtype not in TL_DTYPES or M == 0 or N == 0 or K == 0:
        return reference.lora_linear_bwd(dy, x, weight, lora_a, lora_b, s, mask, scaling, *needed)
    config = _config(M, N, K, R, dy, mask.numel() > 0)
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


def _parts_bytes(length: int, span: int, size: int) -> int:
    """Bytes of the fp32 partial buffer of `size` elements whose long axis is cut into spans."""
    return 4 * size * -(-length // span)


def _cast_bytes(weight: Tensor | None, like: Tensor) -> int:
    return 0 if weight is None or weight.dtype == like.dtype else weight.numel() * like.element_size()


def lora_linear_fwd_workspace(x, weight, lora_a, lora_b, bias, seed, scaling, threshold) -> int:
    """Most bytes of temporaries that lora_linear_fwd holds at a time, from shapes and dtypes only."""
    (M, K), N, R = x.shape, lora_b.shape[0], lora_a.shape[0]
    if x.dtype not in TL_DTYPES or 0 in (M, N, K):
        return 0
    tile = _config(M, N, K, R, x, seed is not None).down
    parts = _parts_bytes(K, tile.span, M * R) if tile.span < K else 0
    return max(parts, _cast_bytes(weight, x))


def lora_linear_bwd_workspace(
    dy, x, weight, lora_a, lora_b, s, mask, scaling, need_dx, need_dlora_a, need_dlora_b, need_dbias
) -> int:
    """Most bytes of temporaries that lora_linear_bwd holds at a time, from shapes and dtypes only."""
    (M, N), (R, K) = dy.shape, lora_a.shape
    if dy.dtype not in TL_DTYPES or 0 in (M, N, K):
        return 0
    config = _config(M, N, K, R, dy, mask.numel() > 0)
    need_g = need_dx or need_dlora_a
    dbias = need_dbias * _parts_bytes(M, config.bwd_dy.span, N)
    if config.dy_passes == 1:
        g_parts = need_g * _parts_bytes(N, config.bwd_dy.block_n, M * R)
        from_dy = g_parts + need_dlora_b * _parts_bytes(M, config.bwd_dy.span, N * R) + dbias
    else:
        g_parts = need_g * _parts_bytes(N, config.down.span, M * R) if config.down.span < N else 0
        from_dy = max(g_parts, need_dlora_b * _parts_bytes(M, config.bwd_da.span, N * R), dbias)
    cast = need_dx * _cast_bytes(weight, dy)
    da_parts = need_dlora_a * _parts_bytes(M, config.bwd_da.span, R * K)
    return need_g * M * R * dy.element_size() + max(from_dy, cast, da_parts)
