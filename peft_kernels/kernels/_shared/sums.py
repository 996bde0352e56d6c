"""Sums in a fixed order: partial buffers without atomics, and long accumulations broken into blocks."""

import triton
import triton.language as tl


@triton.jit
def flush_sum(total, acc, step, EVERY: tl.constexpr):
    """Move acc into total every EVERY steps: a chain of n roundings becomes one of EVERY and one of n / EVERY."""
    full = step % EVERY == EVERY - 1
    return tl.where(full, total + acc, total), tl.where(full, 0.0, acc)


@triton.jit
def _sum_parts_kernel(
    parts_ptr, out_ptr, parts, size, cols, stride_or, stride_oc, alpha, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """out[row, col] = alpha * sum over p of parts[p, row, col] (fp32, contiguous), in a fixed order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (offs_p[:, None] < parts) & (offs[None, :] < size)
        tile = tl.load(parts_ptr + offs_p[:, None] * size + offs[None, :], mask=inside, other=0.0)
        acc += tl.sum(tile, axis=0)
    out_ptrs = out_ptr + (offs // cols) * stride_or + (offs % cols) * stride_oc
    tl.store(out_ptrs, (acc * alpha).to(out_ptr.dtype.element_ty), mask=offs < size)


def sum_parts(parts, out, alpha=1.0):
    """parts [P, rows, cols] fp32 contiguous -> out [rows, cols], any dtype and strides: alpha * parts.sum(0)."""
    size = out.numel()
    if size:
        grid = (triton.cdiv(size, 256),)
        args = (parts.shape[0], size, out.shape[1], *out.stride(), alpha)
        _sum_parts_kernel[grid](parts, out, *args, BLOCK_P=8, BLOCK=256, num_warps=4)
    return out
