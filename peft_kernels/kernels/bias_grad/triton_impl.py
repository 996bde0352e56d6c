"""bias_grad in Triton: column sums in two stages, the same bits every run."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.columns import add_parts
from .._shared.launch import Plan, cdiv, launch
from .._shared.tiles import is_transposed, load_tile
from . import reference
from .configs import STEPS, pick_config

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@triton.jit
def _bias_grad_kernel(
    dy_ptr, parts_ptr,
    M, N, stride_dym, stride_dyn, span,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts[part, n] = the sum of dy over rows [part * span, (part + 1) * span): one read of dy.

    Up to STEPS tiles are added in fp32, element by element; what that gives is added in fp64, where the order of a
    reduction does not matter. fp64 is slow on some parts, at worst 1/64 of fp32: one addition for STEPS elements is
    a tenth of the time that their read takes there.
    """
    pid_n, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_end = tl.minimum((part + 1) * span, M)
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for chain in range(part * span, row_end, STEPS * BLOCK_M):
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for row in range(chain, tl.minimum(chain + STEPS * BLOCK_M, row_end), BLOCK_M):
            offs_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
            acc += load_tile(dy_ptr, offs_m, offs_n, row_end, N, stride_dym, stride_dyn).to(tl.float32)
        total += tl.sum(acc.to(tl.float64), axis=0)
    tl.store(parts_ptr + part * N + offs_n, total.to(tl.float32).to(parts_ptr.dtype.element_ty), mask=offs_n < N)


@lru_cache(maxsize=4096)
def _plan(M: int, N: int, dtype: torch.dtype, transposed: bool, _out: torch.dtype) -> tuple[Plan, int]:
    tile = pick_config(M, N, dtype, transposed)
    grid = cdiv(N, tile.block_n), cdiv(M, tile.span), 1  # neighbours read neighbouring columns
    constants = {"STEPS": STEPS, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return Plan(grid, constants, tile.num_warps, 1), tile.span


def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Arguments and result of reference.bias_grad, which float64 and empty matrices run on any device."""
    if dy.dtype not in _DTYPES or dy.numel() == 0:
        return reference.bias_grad(dy, dtype)
    reference.check(dy, dtype)
    M, N = dy.shape
    plan, span = _plan(M, N, dy.dtype, is_transposed(dy), dtype)
    parts = plan.grid[1]
    dbias = dy.new_empty(N, dtype=dtype)
    out = dbias if parts == 1 else dy.new_empty((parts, N), dtype=torch.float32)
    launch(_bias_grad_kernel, plan, (dy,), (out,), (M, N, *dy.stride(), span))
    if parts > 1:
        add_parts(out, dbias)
    return dbias


def bias_grad_workspace(dy: Tensor, dtype: torch.dtype) -> int:
    """Bytes of temporaries that bias_grad holds, from shape, strides and dtype only."""
    M, N = dy.shape
    if dy.dtype not in _DTYPES or M == 0 or N == 0:
        return 0
    parts = cdiv(M, pick_config(M, N, dy.dtype, is_transposed(dy)).span)
    return 4 * parts * N if parts > 1 else 0
