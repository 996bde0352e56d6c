"""nf4_linear's forward for few rows of x: one read of the packed weight, decoded in registers, split along K."""

import triton
import triton.language as tl

from .._shared.nf4 import level_table, levels_of, load_scales
from .._shared.tiles import load_tile


@triton.jit
def _add_epilogue(acc, bias_ptr, addend_ptr, offs_m, offs_n, M, N, stride_am, stride_an, BIAS, ADDEND):
    """acc [rows, columns] + bias + addend, in fp32."""
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if ADDEND:
        acc += load_tile(addend_ptr, offs_m, offs_n, M, N, stride_am, stride_an).to(tl.float32)
    return acc


@triton.jit
def _nf4_rows_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, bias_ptr, addend_ptr, out_ptr,
    M, N, row_bytes, stride_xm, stride_xk, stride_am, stride_an, span,
    FP4: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BIAS: tl.constexpr, ADDEND: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[part, m, n] = the sum of x[m, k] * weight[n, k] over the bytes of row n in [part * span, (part + 1) * span).

    M is at most BLOCK_M and K a multiple of GROUP, at most the blocksize: GROUP neighbours in a row have one scale.
    Lengths along K are in bytes, two elements: Triton loses a division's alignment, and with it 16-byte copies.
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    HALF: tl.constexpr = BLOCK_K // 2
    pid_n, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_m, offs_n = tl.arange(0, BLOCK_M).to(tl.int64), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_inside, K = (offs_n < N)[:, None], 2 * row_bytes
    table = level_table(FP4)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, row_bytes), HALF):
        offs_b, k = start + tl.arange(0, HALF), 2 * start
        offs_g = k + tl.arange(0, GROUPS) * GROUP
        inside = rows_inside & (offs_b < row_bytes)[None, :]
        packed = tl.load(packed_ptr + offs_n[:, None] * row_bytes + offs_b[None, :], mask=inside, other=0)
        blocks, inside = (offs_n[:, None] * K + offs_g[None, :]) // BLOCKSIZE, rows_inside & (offs_g < K)[None, :]
        scale = load_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, blocks, inside, NESTED)
        levels = tl.reshape(levels_of(packed, table, BLOCK_N, BLOCK_K), (BLOCK_N, GROUPS, GROUP))
        weight = tl.reshape(levels * scale[:, :, None], (BLOCK_N, BLOCK_K)).to(x_ptr.dtype.element_ty)
        x = load_tile(x_ptr, offs_m, k + tl.arange(0, BLOCK_K), M, K, stride_xm, stride_xk)
        acc = tl.dot(weight, tl.trans(x), acc)
    acc = _add_epilogue(tl.trans(acc), bias_ptr, addend_ptr, offs_m, offs_n, M, N, stride_am, stride_an, BIAS, ADDEND)
    out_ptrs = out_ptr + (part * M + offs_m)[:, None] * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _nf4_sum_kernel(
    parts_ptr, bias_ptr, addend_ptr, out_ptr,
    parts, M, N, stride_am, stride_an,
    BIAS: tl.constexpr, ADDEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [M, N] = the sum of parts [parts, M, N], fp32, in their order, and the epilogue: one tile."""
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(parts):
        acc += load_tile(parts_ptr, part * M + offs_m, offs_n, (part + 1) * M, N, N, 1)
    acc = _add_epilogue(acc, bias_ptr, addend_ptr, offs_m, offs_n, M, N, stride_am, stride_an, BIAS, ADDEND)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
