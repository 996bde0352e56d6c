"""norm_fwd's kernels in Triton: rows in registers, and rows too long for that."""

import triton
import triton.language as tl

from .._shared.tiles import load_tile


@triton.jit
def _load_total(
    x_ptr, residual_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, stride_rm, stride_rk,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """x, or x + residual rounded to its dtype; 0 outside."""
    x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
    if HAS_RESIDUAL:
        residual = load_tile(residual_ptr, offs_m, offs_k, M, K, stride_rm, stride_rk)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _scale_and_shift(xhat, weight_ptr, bias_ptr, offs_k, K, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        xhat *= tl.load(weight_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        xhat += tl.load(bias_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]
    return xhat


@triton.jit
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    M, K, stride_xm, stride_xk, stride_rm, stride_rk, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows: read once, both passes of the statistics over registers."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    rows, inside = offs_m < M, (offs_m[:, None] < M) & (offs_k[None, :] < K)
    out = offs_m[:, None] * K + offs_k[None, :]
    total = _load_total(
        x_ptr, residual_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, stride_rm, stride_rk, HAS_RESIDUAL
    )  # fmt: skip
    if HAS_RESIDUAL:
        tl.store(total_ptr + out, total, mask=inside)
    centred = total.to(tl.float32)
    if not RMS:
        mean = tl.sum(centred, axis=1) / K
        tl.store(mean_ptr + offs_m, mean, mask=rows)
        centred = tl.where(inside, centred - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / K + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=rows)
    y = _scale_and_shift(centred * rstd[:, None], weight_ptr, bias_ptr, offs_k, K, HAS_WEIGHT, HAS_BIAS)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_fwd_looped_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    M, K, stride_xm, stride_xk, stride_rm, stride_rk, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, BLOCK_K columns at a time: three passes over x and the residual, of which caches serve two."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, mean = offs_m < M, tl.zeros((BLOCK_M,), dtype=tl.float32)
    if not RMS:
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            acc += _load_total(
                x_ptr, residual_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, stride_rm, stride_rk, HAS_RESIDUAL
            ).to(tl.float32)  # fmt: skip
        mean = tl.sum(acc, axis=1) / K
        tl.store(mean_ptr + offs_m, mean, mask=rows)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        total = _load_total(
            x_ptr, residual_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, stride_rm, stride_rk, HAS_RESIDUAL
        )  # fmt: skip
        if HAS_RESIDUAL:
            tl.store(total_ptr + offs_m[:, None] * K + offs_k[None, :], total, mask=inside)
        centred = tl.where(inside, total.to(tl.float32) - mean[:, None], 0.0)
        acc += centred * centred
    rstd = tl.rsqrt(tl.sum(acc, axis=1) / K + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=rows)
    for start in range(0, K, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        total = _load_total(
            x_ptr, residual_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, stride_rm, stride_rk, HAS_RESIDUAL
        )  # fmt: skip
        xhat = (total.to(tl.float32) - mean[:, None]) * rstd[:, None]
        y = _scale_and_shift(xhat, weight_ptr, bias_ptr, offs_k, K, HAS_WEIGHT, HAS_BIAS)
        out = offs_m[:, None] * K + offs_k[None, :]
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
