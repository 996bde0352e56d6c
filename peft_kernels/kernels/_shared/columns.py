"""The second stage of column sums: the programs' partial sums added up in fp64, as they may be many."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, cdiv, launch
from .tiles import load_tile


@dataclass(frozen=True)
class SumTile:
    """block_p partial sums are added at a time over block_n columns."""

    block_p: int
    block_n: int
    num_warps: int = 4


def pick_sum(N: int) -> SumTile:
    """The tile for N columns: narrow, to have programs enough, with 16 bytes for each thread."""
    block_n = min(64, max(16, triton.next_power_of_2(N)))
    return SumTile(2048 // block_n, block_n)


@triton.jit
def _add_parts_kernel(
    parts_ptr, out_ptr, second_ptr,
    parts, N, split,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums of parts [parts, N], fp32: columns below `split` to out, the others to second."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float64)
    for start in range(0, parts, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        acc += load_tile(parts_ptr, offs_p, offs_n, parts, N, N, 1).to(tl.float64)
    sums = tl.sum(acc, axis=0).to(tl.float32)
    tl.store(out_ptr + offs_n, sums.to(out_ptr.dtype.element_ty), mask=offs_n < split)
    behind = (offs_n >= split) & (offs_n < N)
    tl.store(second_ptr + (offs_n - split), sums.to(second_ptr.dtype.element_ty), mask=behind)


@lru_cache(maxsize=4096)
def _plan(N: int, *_dtypes: torch.dtype) -> Plan:
    tile = pick_sum(N)
    return Plan((cdiv(N, tile.block_n), 1, 1), {"BLOCK_P": tile.block_p, "BLOCK_N": tile.block_n}, tile.num_warps, 1)


def add_parts(parts: Tensor, out: Tensor, second: Tensor | None = None) -> None:
    """parts [P, N] fp32 contiguous -> out [N]; with `second`, out takes the first columns and second [rest] the others.

    One rounding to fp32 after sums in fp64, one more to the dtype of what takes them.
    """
    N, split = parts.shape[1], out.shape[0]
    second = out if second is None else second
    launch(_add_parts_kernel, _plan(N, out.dtype, second.dtype), (parts,), (out, second), (parts.shape[0], N, split))
