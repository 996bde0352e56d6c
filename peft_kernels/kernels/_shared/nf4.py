"""Reading 4-bit weights in Triton: levels, scales, and the kernel that writes a part of a weight out.

A level is looked up in a table of 16 fp32 that a program makes from the constants of formats.nf4 and `tl.gather` keeps
in 64 bytes of shared memory: one load for each weight. A tree of selections takes 15 instructions instead, on half the
lanes, which an H100 has no time for while it writes 16-bit weights at its bandwidth. A value is
level * scale in fp32, rounded once: the bits of formats.nf4_values.dequantize.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.nf4 import LEVELS, NESTED_BLOCKSIZE
from .launch import Plan, cdiv, launch

UNFUSED = {"enable_fp_fusion": False}
"""A constant of every plan whose kernel reads nested scales: their product and their sum are each rounded."""


def _bits(levels: tuple[float, ...]) -> tuple[int, ...]:
    """The levels as int32: a constant -0.0 becomes 0.0 on its way through Triton."""
    return tuple(torch.tensor(levels, dtype=torch.float32).view(torch.int32).tolist())


_NF4, _FP4 = tl.constexpr(_bits(LEVELS["nf4"])), tl.constexpr(_bits(LEVELS["fp4"]))
_NESTED = tl.constexpr(NESTED_BLOCKSIZE)
_STORE_BYTES = 16  # of a thread at a time


@dataclass(frozen=True)
class Tile:
    """A program writes `elements`, `group` neighbours of which, with one scale, are a thread's."""

    elements: int
    group: int
    num_warps: int = 8


def pick_tile(dtype: torch.dtype) -> Tile:
    """The tile that writes `dtype`: stores of 16 bytes, four for each thread of a warp of 32.

    A thread reads 4 or 2 bytes of codes at a time, so that what it reads is what it writes and nothing moves between
    threads; eight warps on an SM have then 16 KB on their way, five times what hides the latency on an H100.
    """
    group = _STORE_BYTES // dtype.itemsize
    return Tile(1024 * group, group)


@triton.jit
def level_table(FP4: tl.constexpr):
    """fp32 [16]: code -> level."""
    codes = tl.arange(0, 16)
    table = tl.zeros((16,), dtype=tl.int32)
    for code in tl.static_range(16):
        table = tl.where(codes == code, _FP4[code] if FP4 else _NF4[code], table)
    return table.to(tl.float32, bitcast=True)


@triton.jit
def load_scales(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, blocks, inside, NESTED: tl.constexpr
):
    """fp32 scales of `blocks` (int64, any shape), 0 where not `inside`; for kernels launched with UNFUSED."""
    scale = tl.load(absmax_ptr + blocks, mask=inside, other=0)
    if NESTED:
        value = tl.load(nested_code_ptr + scale.to(tl.int32))
        value *= tl.load(nested_absmax_ptr + blocks // _NESTED, mask=inside, other=0.0)
        scale = value + tl.load(nested_offset_ptr)
    return scale


@triton.jit
def levels_of(packed, table, ROWS: tl.constexpr, COLS: tl.constexpr):
    """uint8 [ROWS, COLS / 2] -> fp32 [ROWS, COLS]: the high half of a byte comes first."""
    pairs = packed.to(tl.int32)
    codes = tl.reshape(tl.join(pairs >> 4, pairs & 15), (ROWS * COLS,))
    return tl.reshape(tl.gather(table, codes, 0), (ROWS, COLS))


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, out_ptr,
    start, pitch, rows, cols, stride_or,
    FP4: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out[row, col] = the weight's element 2 * (start + row * pitch) + col; start and pitch are in bytes.

    WHOLE: cols is a multiple of GROUP, so that a group is inside or outside as one.
    """
    HALF: tl.constexpr = GROUP // 2
    WIDE: tl.constexpr = BLOCK_COLS // GROUP
    GROUPS: tl.constexpr = BLOCK_ROWS * WIDE
    tiles, pid = tl.cdiv(cols, BLOCK_COLS), tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    row = pid // tiles * BLOCK_ROWS + group // WIDE
    col = pid % tiles * BLOCK_COLS + group % WIDE * GROUP
    byte = start + row * pitch + (pid % tiles * (BLOCK_COLS // 2) + group % WIDE * HALF)
    inside = (row < rows) & (col < cols)
    scale = load_scales(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, byte // (BLOCKSIZE // 2), inside, NESTED
    )
    offs_b, offs_c = tl.arange(0, HALF)[None, :], tl.arange(0, GROUP)[None, :]
    bytes_inside, elements_inside = inside[:, None], inside[:, None]
    if not WHOLE:
        bytes_inside &= col[:, None] + 2 * offs_b < cols
        elements_inside &= col[:, None] + offs_c < cols
    packed = tl.load(packed_ptr + byte[:, None] + offs_b, mask=bytes_inside, other=0)
    values = levels_of(packed, level_table(FP4), GROUPS, GROUP) * scale[:, None]
    out_ptrs = out_ptr + (row * stride_or + col)[:, None] + offs_c
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=elements_inside)


@lru_cache(maxsize=4096)
def _plan(rows: int, cols: int, dtype: torch.dtype, quant_type: str, blocksize: int, nested: bool) -> Plan:
    tile = pick_tile(dtype)
    block_cols = tile.elements
    while rows > 1 and block_cols > tile.group and cols % block_cols:
        block_cols //= 2
    constants = {"FP4": quant_type == "fp4", "NESTED": nested, "BLOCKSIZE": blocksize, "WHOLE": cols % tile.group == 0}
    constants |= {"GROUP": tile.group, "BLOCK_ROWS": tile.elements // block_cols, "BLOCK_COLS": block_cols}
    grid = cdiv(rows, tile.elements // block_cols) * cdiv(cols, block_cols), 1, 1
    return Plan(grid, constants | UNFUSED, tile.num_warps, 1)


def weight_inputs(weight: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """NF4Weight.tensors() as kernels take them: absmax stands in for what is not there."""
    packed, absmax, *nested = weight
    return packed, absmax, *(absmax if tensor is None else tensor for tensor in nested)


def dequantize(
    weight: Sequence[Tensor | None], quant_type: str, blocksize: int, out: Tensor, start: int = 0, pitch: int = 0
) -> Tensor:
    """out [rows, cols], contiguous, of at least one element: row r is the weight's elements from start + r * pitch on.

    `start` is even; for more than one row start, pitch and cols are multiples of 8. Returns out.
    """
    rows, cols = out.shape
    plan = _plan(rows, cols, out.dtype, quant_type, blocksize, weight[2] is not None)
    scalars = (start // 2, pitch // 2, rows, cols, cols if rows > 1 else 0)
    launch(_dequantize_kernel, plan, weight_inputs(weight), (out,), scalars)
    return out
