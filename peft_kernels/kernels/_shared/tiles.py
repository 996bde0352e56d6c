"""Tile order and tile loads that more than one Triton kernel uses."""

import triton
import triton.language as tl
from torch import Tensor


def is_transposed(matrix: Tensor) -> bool:
    """Whether its columns are what lies side by side in memory."""
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row, column) of the tile: GROUP_M rows of tiles are walked together so that they share L2."""
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % group_m, (tile % per_group) // group_m


@triton.jit
def load_tile(ptr, offs_0, offs_1, size_0, size_1, stride_0, stride_1):
    """[len(offs_0), len(offs_1)] elements at any strides, zero outside [size_0, size_1]."""
    inside = (offs_0[:, None] < size_0) & (offs_1[None, :] < size_1)
    return tl.load(ptr + offs_0[:, None] * stride_0 + offs_1[None, :] * stride_1, mask=inside, other=0.0)
