"""How norm's rows are cut into tiles, and its floors.

Every plan follows from shape and dtype alone, so that the order of the additions is the same on every GPU. No matrix
unit takes part; what limits a tile is registers, as a row stays in them between its sums and its use.

Floors, at [8192, 4096] in bf16 and the 3.0 TB/s measured on an H100:
    forward            x read, y written                  134 MB   45 us; with a residual and its total 268 MB, 89 us
    backward           dy and x read, dx written          201 MB   67 us; with dtotal 268 MB, 89 us
The backward's partial sums, 4 bytes per column, sum and part, are written and read besides: 8 % of that at this shape,
most of it in the L2 cache, and 4 % at most where there are 65,536 rows or more. Where a row and its sums do not fit the
registers (`fits_backward`), dy and x are read twice: 112 us.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

STEPS = 8  # tiles in a chain of fp32 additions: 7 roundings, before their sum moves to fp64
_ELEMENTS = 2048  # of a forward tile: rows are put together up to that many
_BACKWARD_ELEMENTS = 1024  # of a backward tile: half the registers are for sums
_PER_WARP, _WITH_SUMS_PER_WARP = 512, 256  # elements: 16 for each thread, or 8 beside sums of 3 registers an element
_MOST_ROWS, _MOST_ROWS_BACKWARD = 128, 32  # of a tile: 64 of 16 columns spill on an H100
_LONGEST_FORWARD = 16_384  # row that stays in registers
_LONGEST, _LONGEST_WITH_SUMS = 8192, 4096  # the same in the backward, alone or with sums over rows
LOOP_BLOCK = 4096  # columns at a time of a longer row
_PROGRAMS = 256  # of the backward: two blocks for each SM of a large GPU
_SPAN_TILES, _MOST_PROGRAMS = 64, 2048  # more programs where spans get longer than that
_LINE_BYTES = 512  # of a row of a tile of the pass by columns: a warp's 16-byte loads
_COLUMN_ELEMENTS, _COLUMN_ELEMENTS_WITH_DX = 2048, 1024  # of such a tile
_COLUMN_PROGRAMS = 4096


@dataclass(frozen=True)
class Tile:
    """A program owns `span` rows, and reads block_m at a time of block_k columns."""

    block_m: int
    block_k: int
    num_warps: int
    span: int = 0


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, and 16 at least."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def fits_forward(K: int) -> bool:
    """Whether a row of K stays in registers in the forward."""
    return K <= _LONGEST_FORWARD


def fits_backward(K: int, sums: int) -> bool:
    """Whether a row of K stays in registers while `sums` sums over rows (of dweight and dbias) are carried there."""
    return (_LONGEST_WITH_SUMS if sums else _LONGEST) >= K


def _warps(elements: int, per_warp: int) -> int:
    return min(16, max(4, elements // per_warp))


@lru_cache(maxsize=4096)
def pick_forward(K: int) -> Tile:
    """The forward's tile: whole rows, of rows too long for that LOOP_BLOCK columns at a time."""
    block_k = _power_of_two(K) if fits_forward(K) else LOOP_BLOCK
    block_m = min(_MOST_ROWS, max(1, _ELEMENTS // block_k))
    return Tile(block_m, block_k, _warps(block_m * block_k, _PER_WARP))


@lru_cache(maxsize=4096)
def pick_backward(M: int, K: int, sums: int) -> Tile:
    """The backward's tile, of whole rows, with its program's span: `fits_backward(K, sums)`, M at least 1.

    A term of a sum takes 7 roundings in fp32 on its way through a chain, one with the partial sum and one with the
    result: 9 of the 16 that every sum here is allowed, the rest is for what fp64 adds.
    """
    block_k = _power_of_two(K)
    block_m = min(_MOST_ROWS_BACKWARD, max(1, _BACKWARD_ELEMENTS // block_k))
    tiles, elements = -(-M // block_m), block_m * block_k
    # Without sums nothing is carried from one tile to the next.
    span = max(min(-(-tiles // _PROGRAMS), _SPAN_TILES), -(-tiles // _MOST_PROGRAMS), 2) if sums else 1
    return Tile(block_m, block_k, _warps(elements, _WITH_SUMS_PER_WARP if sums else _PER_WARP), span * block_m)


@lru_cache(maxsize=4096)
def pick_columns(M: int, K: int, dtype: torch.dtype, need_dx: bool) -> Tile:
    """The tile of the pass by columns, as bias_grad's, but half as large or less: it holds x, and dx, beside dy."""
    block_k = min(_LINE_BYTES // dtype.itemsize, _power_of_two(K))
    block_m = min(_MOST_ROWS, (_COLUMN_ELEMENTS_WITH_DX if need_dx else _COLUMN_ELEMENTS) // block_k)
    chains = max(1, -(-M * -(-K // block_k) // (_COLUMN_PROGRAMS * STEPS * block_m)))
    return Tile(block_m, block_k, 4, chains * STEPS * block_m)


def floor_bytes_forward(M: int, K: int, dtype: torch.dtype, residual: bool = False, rms: bool = False) -> int:
    """Bytes that must move: x read, y written, with a residual both again; rstd and mean written in fp32."""
    return (4 if residual else 2) * M * K * dtype.itemsize + (4 if rms else 8) * M


def floor_bytes_backward(M: int, K: int, dtype: torch.dtype, dtotal: bool = False, rms: bool = False) -> int:
    """Bytes that must move: dy, x (and dtotal) and the statistics read, dx, dweight and dbias written."""
    return ((4 if dtotal else 3) * M * K + 2 * K) * dtype.itemsize + (4 if rms else 8) * M
