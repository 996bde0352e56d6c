"""How the column sum and the activation pass are cut into tiles, and their floors.

The plan follows from shape and dtype alone, so that the order of the additions is the same on every GPU. No matrix unit
and hardly any shared memory take part: what parts differ in, their bandwidth, changes nothing about the tile.

The floor is one read of dy: `floor_bytes` / bandwidth, at [8192, 4096] in bf16 67 MB, 22 us at the 3.0 TB/s measured on
an H100. The partial sums add 1.6 % to that at most: 4 bytes per column and 256 rows or more, written and read.
The activation pass reads dy and z (of ReLU the mask) and writes dz: `act_floor_bytes`, 201 MB and 67 us there. Its
derivative takes about 37 instructions an element; an H100 has time for 57 while three 16-bit numbers move.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

_LINE_BYTES = 512  # of one row of a tile, or column of a transposed one: a warp's 16-byte loads
_TILE_BYTES = 8192  # of a tile: 64 bytes in flight for each thread, registers for five blocks per SM
_ACT_TILE_BYTES = 4096  # of the activation pass, which holds two such tiles
_MOST_LINES = 128  # of a tile of a narrow matrix
STEPS = 8  # tiles in a chain of fp32 additions: 7 roundings, before their sum moves to fp64
_LEAST_CHAINS = 2  # per program: 256 rows of a wide matrix, below which the partial sums weigh
_PROGRAMS = 4096  # at most, from where spans grow: several waves of blocks on any part, so that the last one is short


@dataclass(frozen=True)
class Tile:
    """A program owns `span` rows by block_n columns, which it reads block_m rows at a time, STEPS such in a chain."""

    block_m: int
    block_n: int
    span: int
    num_warps: int = 4


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def pick_config(M: int, N: int, dtype: torch.dtype, transposed: bool = False, tile_bytes: int = _TILE_BYTES) -> Tile:
    """The tile for dy [M, N], M and N at least 1; transposed: with a row stride of 1, where columns are lines.

    A term takes 7 roundings in fp32 on its way through a chain, one with the partial sum and one with the result: 9 of
    the 16 that every sum here is allowed, the rest is for what fp64 adds.
    """
    line = min(_LINE_BYTES // dtype.itemsize, max(16, _power_of_two(M if transposed else N)))
    lines = min(_MOST_LINES, tile_bytes // dtype.itemsize // line)
    block_m, block_n = (line, lines) if transposed else (lines, line)
    chains = max(_LEAST_CHAINS, -(-M * -(-N // block_n) // (_PROGRAMS * STEPS * block_m)))
    # Down the lines sums cross a warp: with four warps Triton 3.9 spills on an RTX 5090.
    return Tile(block_m, block_n, chains * STEPS * block_m, 8 if transposed else 4)


def pick_act(M: int, N: int, dtype: torch.dtype, transposed: bool = False, light: bool = False) -> Tile:
    """The tile of the activation pass for dy [M, N]: as pick_config's, of half the bytes.

    light: ReLU's pass, or one that writes no dz. Triton 3.9 spills a few registers of those with four warps, and of the
    others, where columns are lines, with eight. Rows of a few elements take an address for each: with four warps
    compute capability 100 spills.
    """
    tile = pick_config(M, N, dtype, transposed, _ACT_TILE_BYTES)
    return replace(tile, num_warps=8 if light or tile.block_n == 16 else 4)


def floor_bytes(M: int, N: int, dtype: torch.dtype) -> int:
    """Bytes that must move: dy read once, dbias written."""
    return (M + 1) * N * dtype.itemsize


def act_floor_bytes(M: int, N: int, dtype: torch.dtype, activation: str, need_dz: bool = True) -> int:
    """Bytes that must move in act_bwd: dy and what was kept read once, dz and dbias written."""
    kept = M * -(-N // 8) if activation == "relu" else M * N * dtype.itemsize
    return (M * (1 + need_dz) + 1) * N * dtype.itemsize + kept
