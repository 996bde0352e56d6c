"""Sums in a fixed order: partial buffers without atomics, and long accumulations broken into blocks."""

import triton
import triton.language as tl

from .launch import launch

_BLOCK = 256  # elements that one program sums


@triton.jit
def flush_sum(total, acc, step, EVERY: tl.constexpr):
    """Move acc into total every EVERY steps: a chain of n roundings becomes one of EVERY and one of n / EVERY."""
    full = step % EVERY == EVERY - 1
    return tl.where(full, total + acc, total), tl.where(full, 0.0, acc)


@triton.jit
def _sum_block(parts_ptr, out_ptr, parts, size, cols, stride_or, stride_oc, alpha, block, BLOCK_P, BLOCK):
    """out[row, col] = alpha * sum over p of parts[p, row, col] (fp32, contiguous), in a fixed order, for one block."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (offs_p[:, None] < parts) & (offs[None, :] < size)
        tile = tl.load(parts_ptr + offs_p[:, None] * size + offs[None, :], mask=inside, other=0.0)
        acc += tl.sum(tile, axis=0)
    out_ptrs = out_ptr + (offs // cols) * stride_or + (offs % cols) * stride_oc
    tl.store(out_ptrs, (acc * alpha).to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _sum_parts_kernel(
    a_ptr, a_out_ptr, b_ptr, b_out_ptr,
    a_parts, a_size, a_cols, a_stride_or, a_stride_oc, a_alpha,
    b_parts, b_size, b_cols, b_stride_or, b_stride_oc, b_alpha,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two independent sums in one launch: the first programs make a's blocks, the others b's."""
    block, a_blocks = tl.program_id(0), tl.cdiv(a_size, BLOCK)
    if block < a_blocks:
        _sum_block(a_ptr, a_out_ptr, a_parts, a_size, a_cols, a_stride_or, a_stride_oc, a_alpha, block, BLOCK_P, BLOCK)
    else:
        block -= a_blocks
        _sum_block(b_ptr, b_out_ptr, b_parts, b_size, b_cols, b_stride_or, b_stride_oc, b_alpha, block, BLOCK_P, BLOCK)


def sum_parts(*jobs):
    """One or two jobs (parts, out, alpha): parts [P, rows, cols] fp32 contiguous -> out [rows, cols] of any dtype and
    strides = alpha * parts.sum(0), in a fixed order and one launch."""
    jobs = [job for job in jobs if job[1].numel()]
    if not jobs:
        return
    first, second = (jobs * 2)[:2]
    blocks = sum(triton.cdiv(out.numel(), _BLOCK) for _, out, _ in jobs)
    scalars = []
    for parts, out, alpha in (first, second):
        scalars += [parts.shape[0], out.numel(), out.shape[1], *out.stride(), float(alpha)]
    tensors = (first[0], first[1], second[0], second[1])
    launch(_sum_parts_kernel, (blocks, 1, 1), tensors, tuple(scalars), {"BLOCK_P": 8, "BLOCK": _BLOCK}, 4, 3)
