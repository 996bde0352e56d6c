"""Sums in a fixed order: partial buffers without atomics, and long accumulations broken into blocks."""

from functools import lru_cache

import triton
import triton.language as tl

from .launch import Plan, cdiv, launch

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
    a_ptr, b_ptr, a_out_ptr, b_out_ptr,
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


@lru_cache(maxsize=4096)
def _plan(blocks: int, *_dtypes) -> Plan:
    return Plan((blocks, 1, 1), {"BLOCK_P": 8, "BLOCK": _BLOCK})


def sum_parts(parts, out, alpha=1.0, second=None):
    """parts [P, rows, cols] fp32 contiguous -> out [rows, cols] of any dtype and strides = alpha * parts.sum(0), in a
    fixed order. `second` is one more (parts, out, alpha) for the same launch. Returns out."""
    jobs = [job for job in ((parts, out, alpha), second) if job is not None and job[1].numel()]
    if not jobs:
        return out
    blocks, scalars = 0, ()
    for job_parts, job_out, job_alpha in jobs:
        size = job_out.numel()
        blocks += cdiv(size, _BLOCK)
        scalars += (job_parts.shape[0], size, job_out.shape[1], *job_out.stride(), float(job_alpha))
    a, b = jobs[0], jobs[-1]
    scalars = scalars if len(jobs) == 2 else 2 * scalars
    plan = _plan(blocks, a[1].dtype, b[1].dtype)
    launch(_sum_parts_kernel, plan, (a[0], b[0]), (a[1], b[1]), scalars)
    return out
