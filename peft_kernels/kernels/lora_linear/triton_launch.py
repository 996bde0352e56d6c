"""Launchers of the LoRA linear's Triton kernels: grids, strides, partial buffers, tensor descriptors."""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._shared.launch import Plan, cdiv, launch
from .._shared.sums import sum_parts
from .._shared.tiles import is_transposed
from .configs import Config
from .reference import PHILOX_ROUNDS
from .tiles import Tile, gemm_rank_block, pass_rank_block
from .triton_gemm import _lora_gemm_kernel
from .triton_passes import _lora_bwd_da_kernel, _lora_bwd_dy_kernel, _lora_down_kernel

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FLUSH = 8  # fp32: block sums of the K loop are moved to a second accumulator every 8 steps


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


@lru_cache(maxsize=4096)
def _down_plan(M: int, K: int, R: int, tile: Tile, dropout: bool, dtype: torch.dtype, precision: str) -> Plan:
    block_r = pass_rank_block(R)
    grid = cdiv(M, tile.block_m), cdiv(K, tile.span), cdiv(R, block_r)
    constants = dict(
        HAS_DROPOUT=dropout, ROUNDS=PHILOX_ROUNDS, PRECISION=precision, FLUSH=flush_steps(dtype),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r,
    )  # fmt: skip
    return Plan(grid, constants, tile.num_warps, tile.num_stages)


def down(x: Tensor, a: Tensor, tile: Tile, seed: Tensor | None = None, threshold: int = 0) -> tuple[Tensor, Tensor]:
    """drop(x) @ a.T [M, R] in x's dtype, and the packed mask: x [M, K], a [R, K], any strides."""
    M, K = x.shape
    R = a.shape[0]
    plan = _down_plan(M, K, R, tile, seed is not None, x.dtype, precision(x.dtype))
    splits = plan.grid[1]
    s = x.new_empty(M, R)
    mask = x.new_empty((0,) if seed is None else (M, cdiv(K, 8)), dtype=torch.uint8)
    out = s if splits == 1 else x.new_empty((splits, M, R), dtype=torch.float32)
    scalars = (M, K, R, *x.stride(), *a.stride(), threshold, tile.span)
    launch(_lora_down_kernel, plan, (x, a, x if seed is None else seed), (out, mask), scalars)
    if splits > 1:
        sum_parts(out, s)
    return s, mask


@lru_cache(maxsize=4096)
def _gemm_plan(
    M: int, N: int, R: int, tile: Tile, dtype: torch.dtype, device: torch.device, precision: str, **flags: bool
) -> Plan:
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    block_r = gemm_rank_block(R, dtype.itemsize)
    constants = flags | dict(
        PRECISION=precision, FLUSH=flush_steps(dtype), DTYPE=TL_DTYPES[dtype], R_BLOCKS=cdiv(R, block_r),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r,
        GROUP_M=tile.group_m, SUBTILES=tile.subtiles,
    )  # fmt: skip
    programs = min(tiles, _sm_count(device)) if flags["HAS_BASE"] else tiles
    return Plan((programs, 1, 1), constants, tile.num_warps, tile.num_stages)


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
    tile = config.gemm if has_base else config.delta
    if not has_base:
        p, q = low, t
    q_transposed = is_transposed(q)
    q_rows = q.t() if q_transposed else q
    descriptors = has_base and config.descriptors and p.shape[1] > 0 and all(map(_aligned, (p, q_rows, c)))
    has_mask = mask is not None and mask.numel() > 0
    plan = _gemm_plan(
        M, N, R, tile, low.dtype, low.device, precision(low.dtype), HAS_BASE=has_base, HAS_BIAS=bias is not None,
        HAS_MASK=has_mask, Q_TRANSPOSED=q_transposed, DESCRIPTORS=descriptors,
    )  # fmt: skip
    scalars = (float(alpha), M, N, p.shape[1], R, *p.stride(), *q.stride(), *t.stride(), c.stride(0))
    out = c
    if descriptors:
        q_block = [tile.block_n, tile.block_k] if q_transposed else [tile.block_k, tile.block_n]
        p = TensorDescriptor.from_tensor(p, [tile.block_m, tile.block_k])
        q = TensorDescriptor.from_tensor(q_rows, q_block)
        out = TensorDescriptor.from_tensor(c, [tile.block_m, tile.block_n // tile.subtiles])
    inputs = (p, q, low, t, mask if has_mask else low, low if bias is None else bias)
    launch(_lora_gemm_kernel, plan, inputs, (out,), scalars)
    return c


@lru_cache(maxsize=4096)
def _dy_plan(M: int, N: int, R: int, tile: Tile, precision: str, **needs: bool) -> Plan:
    constants = needs | dict(
        PRECISION=precision, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_R=pass_rank_block(R) if needs["NEED_G"] or needs["NEED_DB"] else 16,
    )  # fmt: skip
    return Plan((cdiv(M, tile.span), cdiv(N, tile.block_n), 1), constants, tile.num_warps, tile.num_stages)


def dy_pass(
    dy: Tensor, lora_b: Tensor, s: Tensor | None, scaling: float, tile: Tile, need_g: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(g [M, R], dlora_b [N, R] if s is given, dbias [N]) from one read of dy [M, N]; None where not asked for."""
    M, N = dy.shape
    R = lora_b.shape[1]
    need_db = s is not None
    plan = _dy_plan(M, N, R, tile, precision(dy.dtype), NEED_G=need_g, NEED_DB=need_db, NEED_DBIAS=need_dbias)
    row_parts, col_parts, _ = plan.grid

    def buffer(needed: bool, *shape: int) -> Tensor:
        return dy.new_empty(shape if needed else (0,), dtype=torch.float32)

    g_parts = buffer(need_g, col_parts, M, R)
    db_parts = buffer(need_db, row_parts, N, R)
    dbias_parts = buffer(need_dbias, row_parts, N)
    scalars = (M, N, R, *dy.stride(), *lora_b.stride(), tile.span)
    launch(_lora_bwd_dy_kernel, plan, (dy, lora_b, s if need_db else dy), (g_parts, db_parts, dbias_parts), scalars)
    g = dy.new_empty(M, R) if need_g else None
    dlora_b = lora_b.new_empty(N, R) if need_db else None
    if need_g:
        sum_parts(g_parts, g, 1.0, (db_parts, dlora_b, scaling) if need_db else None)
    elif need_db:
        sum_parts(db_parts, dlora_b, scaling)
    dbias = sum_parts(dbias_parts, buffer(True, 1, N)).view(N) if need_dbias else None
    return g, dlora_b, dbias


@lru_cache(maxsize=4096)
def _outer_plan(M: int, K: int, R: int, tile: Tile, has_mask: bool, precision: str) -> Plan:
    block_r = pass_rank_block(R)
    constants = dict(
        HAS_MASK=has_mask, PRECISION=precision, BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r
    )
    return Plan(
        (cdiv(K, tile.block_n), cdiv(M, tile.span), cdiv(R, block_r)), constants, tile.num_warps, tile.num_stages
    )


def outer(x: Tensor, g: Tensor, scaling: float, tile: Tile, out: Tensor, mask: Tensor | None = None) -> Tensor:
    """out [R, K] (any strides) = scaling * g.T @ drop(x): x [M, K] any strides, g [M, R] contiguous."""
    M, K = x.shape
    R = g.shape[1]
    has_mask = mask is not None and mask.numel() > 0
    plan = _outer_plan(M, K, R, tile, has_mask, precision(x.dtype))
    parts = x.new_empty((plan.grid[1], R, K), dtype=torch.float32)
    scalars = (M, K, R, *x.stride(), *parts.stride(), tile.span)
    launch(_lora_bwd_da_kernel, plan, (x, g, mask if has_mask else x), (parts,), scalars)
    return sum_parts(parts, out, scaling)
