"""norm_bwd's kernels in Triton: by rows in one read of dy and x; by columns, where there is no dx or rows are long."""

import triton
import triton.language as tl

from .._shared.tiles import load_tile


@triton.jit
def _load_xhat(
    x_ptr, mean_ptr, rstd_ptr, offs_m, offs_k, row_end, K, stride_xm, stride_xk, RMS: tl.constexpr
):  # fmt: skip
    """xhat and rstd, both 0 past row_end. Past K it is any number, for dy is 0 there."""
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < row_end, other=0.0)
    x = load_tile(x_ptr, offs_m, offs_k, row_end, K, stride_xm, stride_xk).to(tl.float32)
    if not RMS:
        x -= tl.load(mean_ptr + offs_m, mask=offs_m < row_end, other=0.0)[:, None]
    return x * rstd[:, None], rstd


@triton.jit
def _weight_row(weight_ptr, offs_k, K):
    return tl.load(weight_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_dx(
    dx, dtotal_ptr, dx_ptr, offs_m, offs_k, row_end, K, stride_dtm, stride_dtk, HAS_DTOTAL: tl.constexpr
):  # fmt: skip
    """dx [row_end, K] contiguous, the gradient of total added before the one rounding."""
    if HAS_DTOTAL:
        dx += load_tile(dtotal_ptr, offs_m, offs_k, row_end, K, stride_dtm, stride_dtk).to(tl.float32)
    inside = (offs_m[:, None] < row_end) & (offs_k[None, :] < K)
    tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_sum(ptr, total, offs_k, K):
    tl.store(ptr + offs_k, total.to(tl.float32).to(ptr.dtype.element_ty), mask=offs_k < K)


@triton.jit
def _norm_bwd_rows_kernel(
    dy_ptr, dtotal_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    M, K, stride_dym, stride_dyk, stride_dtm, stride_dtk, stride_xm, stride_xk, span, part_size, dbias_start,
    HAS_DTOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, RMS: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of `span` whole rows, and their sums for dweight and dbias, from one read of dy and x.

    Up to STEPS tiles are added in fp32, element by element; what that gives is added in fp64, where the order of a
    reduction does not matter. On parts of slow fp64 that is hidden behind the reads, as in the bias gradient.
    """
    part = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    row_end = tl.minimum((part + 1) * span, M)
    dweight = tl.zeros((BLOCK_K,), dtype=tl.float64)
    dbias = tl.zeros((BLOCK_K,), dtype=tl.float64)
    for chain in range(part * span, row_end, STEPS * BLOCK_M):
        dw_acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        db_acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for row in range(chain, tl.minimum(chain + STEPS * BLOCK_M, row_end), BLOCK_M):
            offs_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
            dy = load_tile(dy_ptr, offs_m, offs_k, row_end, K, stride_dym, stride_dyk).to(tl.float32)
            xhat, rstd = _load_xhat(x_ptr, mean_ptr, rstd_ptr, offs_m, offs_k, row_end, K, stride_xm, stride_xk, RMS)
            g = dy
            if HAS_WEIGHT:
                g = dy * _weight_row(weight_ptr, offs_k, K)
            dx = g - xhat * (tl.sum(g * xhat, axis=1) / K)[:, None]
            if not RMS:
                dx -= (tl.sum(g, axis=1) / K)[:, None]
            dx *= rstd[:, None]
            _store_dx(dx, dtotal_ptr, dx_ptr, offs_m, offs_k, row_end, K, stride_dtm, stride_dtk, HAS_DTOTAL)
            if NEED_DWEIGHT:
                dw_acc += dy * xhat
            if NEED_DBIAS:
                db_acc += dy
        if NEED_DWEIGHT:
            dweight += tl.sum(dw_acc.to(tl.float64), axis=0)
        if NEED_DBIAS:
            dbias += tl.sum(db_acc.to(tl.float64), axis=0)
    if NEED_DWEIGHT:
        _store_sum(dweight_ptr + part * part_size, dweight, offs_k, K)
    if NEED_DBIAS:
        _store_sum(dbias_ptr + part * part_size + dbias_start, dbias, offs_k, K)


@triton.jit
def _norm_bwd_terms_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, terms_ptr,
    M, K, stride_dym, stride_dyk, stride_xm, stride_xk,
    HAS_WEIGHT: tl.constexpr, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """terms[0, m] = mean(g xhat) and, but for RMSNorm, terms[1, m] = mean(g) of long rows."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    products = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        g = load_tile(dy_ptr, offs_m, offs_k, M, K, stride_dym, stride_dyk).to(tl.float32)
        if HAS_WEIGHT:
            g *= _weight_row(weight_ptr, offs_k, K)
        xhat, _ = _load_xhat(x_ptr, mean_ptr, rstd_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, RMS)
        products += g * xhat
        sums += g
    tl.store(terms_ptr + offs_m, tl.sum(products, axis=1) / K, mask=offs_m < M)
    if not RMS:
        tl.store(terms_ptr + M + offs_m, tl.sum(sums, axis=1) / K, mask=offs_m < M)


@triton.jit
def _norm_bwd_columns_kernel(
    dy_ptr, dtotal_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, terms_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    M, K, stride_dym, stride_dyk, stride_dtm, stride_dtk, stride_xm, stride_xk, span, part_size, dbias_start,
    HAS_DTOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, RMS: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _norm_bwd_rows_kernel, BLOCK_K columns of `span` rows; dx from the terms that are there already."""
    part = tl.program_id(1).to(tl.int64)
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_end = tl.minimum((part + 1) * span, M)
    dweight = tl.zeros((BLOCK_K,), dtype=tl.float64)
    dbias = tl.zeros((BLOCK_K,), dtype=tl.float64)
    for chain in range(part * span, row_end, STEPS * BLOCK_M):
        dw_acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        db_acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for row in range(chain, tl.minimum(chain + STEPS * BLOCK_M, row_end), BLOCK_M):
            offs_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
            dy = load_tile(dy_ptr, offs_m, offs_k, row_end, K, stride_dym, stride_dyk).to(tl.float32)
            if NEED_DX or NEED_DWEIGHT:
                xhat, rstd = _load_xhat(
                    x_ptr, mean_ptr, rstd_ptr, offs_m, offs_k, row_end, K, stride_xm, stride_xk, RMS
                )  # fmt: skip
            if NEED_DX:
                g = dy
                if HAS_WEIGHT:
                    g = dy * _weight_row(weight_ptr, offs_k, K)
                rows = offs_m < row_end
                dx = g - xhat * tl.load(terms_ptr + offs_m, mask=rows, other=0.0)[:, None]
                if not RMS:
                    dx -= tl.load(terms_ptr + M + offs_m, mask=rows, other=0.0)[:, None]
                dx *= rstd[:, None]
                _store_dx(dx, dtotal_ptr, dx_ptr, offs_m, offs_k, row_end, K, stride_dtm, stride_dtk, HAS_DTOTAL)
            if NEED_DWEIGHT:
                dw_acc += dy * xhat
            if NEED_DBIAS:
                db_acc += dy
        if NEED_DWEIGHT:
            dweight += tl.sum(dw_acc.to(tl.float64), axis=0)
        if NEED_DBIAS:
            dbias += tl.sum(db_acc.to(tl.float64), axis=0)
    if NEED_DWEIGHT:
        _store_sum(dweight_ptr + part * part_size, dweight, offs_k, K)
    if NEED_DBIAS:
        _store_sum(dbias_ptr + part * part_size + dbias_start, dbias, offs_k, K)
