"""Launchers of the LoRA linear's Triton kernels: grids, strides, partial buffers, tensor descriptors."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._shared.launch import launch
from .._shared.sums import sum_parts
from .configs import Config
from .reference import PHILOX_ROUNDS
from .tiles import Tile, delta_tile, gemm_rank_block, pass_rank_block
from .triton_gemm import _lora_gemm_kernel
from .triton_passes import _lora_bwd_da_kernel, _lora_bwd_dy_kernel, _lora_down_kernel

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FLUSH = 8  # fp32: block sums of the K loop are moved to a second accumulator every 8 steps


@lru_cache
def arch_of(device: torch.device) -> int | str:
    """90 for compute capability 9.0, "gfx942" on ROCm; 90 for CPU tensors, which only the interpreter takes."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch.get_float32_matmul_precision(); 16-bit ones are exact in fp32 either way."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def flush_steps(dtype: torch.dtype) -> int:
    return _FLUSH if dtype == torch.float32 else 0


def _aligned(tensor: Tensor) -> bool:
    """Whether a [rows, cols] tensor with contiguous columns can have a TMA descriptor."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and tensor.stride(0) > 0 and row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0


def down(x: Tensor, a: Tensor, tile: Tile, seed: Tensor | None = None, threshold: int = 0) -> tuple[Tensor, Tensor]:
    """drop(x) @ a.T [M, R] in x's dtype, and the packed mask: x [M, K], a [R, K], any strides."""
    M, K = x.shape
    R = a.shape[0]
    block_r = pass_rank_block(R)
    splits = triton.cdiv(K, tile.span)
    s = x.new_empty(M, R)
    mask = x.new_empty((0,) if seed is None else (M, triton.cdiv(K, 8)), dtype=torch.uint8)
    out = s if splits == 1 else x.new_empty((splits, M, R), dtype=torch.float32)
    constants = dict(
        HAS_DROPOUT=seed is not None, ROUNDS=PHILOX_ROUNDS, PRECISION=precision(x.dtype), FLUSH=flush_steps(x.dtype),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r,
    )  # fmt: skip
    launch(
        _lora_down_kernel, (triton.cdiv(M, tile.block_m), splits, triton.cdiv(R, block_r)),
        (x, a, x if seed is None else seed, out, mask), (M, K, R, *x.stride(), *a.stride(), threshold, tile.span),
        constants, tile.num_warps, tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_parts((out, s, 1.0))
    return s, mask


def gemm(
    p: Tensor | None,
    q: Tensor | None,
    low: Tensor,
    t: Tensor,
    alpha: float,
    config: Config,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """p @ q + alpha * drop(low @ t) + bias: p [M, K], q [K, N] (None: no base product), low [M, R], t [R, N]."""
    M, R = low.shape
    N = t.shape[1]
    c = low.new_empty(M, N)
    has_base = p is not None
    tile = config.gemm if has_base else delta_tile(low.element_size())
    if not has_base:
        p, q = low, t
    q_transposed = q.stride(0) == 1 and q.stride(1) != 1
    q_rows = q.t() if q_transposed else q
    descriptors = has_base and config.descriptors and p.shape[1] > 0 and all(map(_aligned, (p, q_rows, c)))
    args = (p, q, c)
    if descriptors:
        q_block = [tile.block_n, tile.block_k] if q_transposed else [tile.block_k, tile.block_n]
        args = (
            TensorDescriptor.from_tensor(p, [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(q_rows, q_block),
            TensorDescriptor.from_tensor(c, [tile.block_m, tile.block_n // tile.subtiles]),
        )
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    block_r = gemm_rank_block(R, low.element_size())
    has_mask = mask is not None and mask.numel() > 0
    constants = dict(
        HAS_BASE=has_base, HAS_BIAS=bias is not None, HAS_MASK=has_mask, Q_TRANSPOSED=q_transposed,
        DESCRIPTORS=descriptors, PRECISION=precision(low.dtype), FLUSH=flush_steps(low.dtype),
        DTYPE=TL_DTYPES[low.dtype], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r,
        R_BLOCKS=triton.cdiv(R, block_r), GROUP_M=tile.group_m, SUBTILES=tile.subtiles,
    )  # fmt: skip
    launch(
        _lora_gemm_kernel, (min(tiles, _sm_count(low.device)) if has_base else tiles, 1, 1),
        (args[0], args[1], low, t, mask if has_mask else low, low if bias is None else bias, args[2]),
        (float(alpha), M, N, p.shape[1], R, *p.stride(), *q.stride(), *t.stride(), c.stride(0)),
        constants, tile.num_warps, tile.num_stages,
    )  # fmt: skip
    return c


def dy_pass(
    dy: Tensor, lora_b: Tensor, s: Tensor | None, scaling: float, tile: Tile, need_g: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(g [M, R], dlora_b [N, R] if s is given, dbias [N]) from one read of dy [M, N]; None where not asked for."""
    M, N = dy.shape
    R = lora_b.shape[1]
    row_parts, col_parts = triton.cdiv(M, tile.span), triton.cdiv(N, tile.block_n)

    def buffer(needed: bool, *shape: int) -> Tensor:
        return dy.new_empty(shape if needed else (0,), dtype=torch.float32)

    g_parts = buffer(need_g, col_parts, M, R)
    db_parts = buffer(s is not None, row_parts, N, R)
    dbias_parts = buffer(need_dbias, row_parts, N)
    constants = dict(
        NEED_G=need_g, NEED_DB=s is not None, NEED_DBIAS=need_dbias, PRECISION=precision(dy.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=pass_rank_block(R) if need_g or s is not None else 16,
    )  # fmt: skip
    launch(
        _lora_bwd_dy_kernel, (row_parts, col_parts, 1),
        (dy, lora_b, dy if s is None else s, g_parts, db_parts, dbias_parts),
        (M, N, R, *dy.stride(), *lora_b.stride(), tile.span),
        constants, tile.num_warps, tile.num_stages,
    )  # fmt: skip
    g = dy.new_empty(M, R) if need_g else None
    dlora_b = None if s is None else lora_b.new_empty(N, R)
    jobs = [(g_parts, g, 1.0)] if need_g else []
    sum_parts(*jobs, *([] if s is None else [(db_parts, dlora_b, scaling)]))
    dbias = None
    if need_dbias:
        dbias = buffer(True, N)
        sum_parts((dbias_parts, dbias[None], 1.0))
    return g, dlora_b, dbias


def outer(x: Tensor, g: Tensor, scaling: float, tile: Tile, out: Tensor, mask: Tensor | None = None) -> Tensor:
    """out [R, K] (any strides) = scaling * g.T @ drop(x): x [M, K] any strides, g [M, R] contiguous."""
    M, K = x.shape
    R = g.shape[1]
    block_r = pass_rank_block(R)
    splits = triton.cdiv(M, tile.span)
    parts = x.new_empty((splits, R, K), dtype=torch.float32)
    has_mask = mask is not None and mask.numel() > 0
    constants = dict(
        HAS_MASK=has_mask, PRECISION=precision(x.dtype),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r,
    )  # fmt: skip
    launch(
        _lora_bwd_da_kernel, (triton.cdiv(K, tile.block_n), splits, triton.cdiv(R, block_r)),
        (x, g, mask if has_mask else x, parts), (M, K, R, *x.stride(), *parts.stride(), tile.span),
        constants, tile.num_warps, tile.num_stages,
    )  # fmt: skip
    sum_parts((parts, out, scaling))
    return out
