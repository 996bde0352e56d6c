"""The skinny passes of the LoRA linear in Triton: each reads one large tensor once and makes rank-sized outputs."""

import triton
import triton.language as tl

from .._shared.dropout import draw_mask_bytes, load_mask, unpack_mask
from .._shared.sums import flush_sum
from .._shared.tiles import load_tile


@triton.jit
def _lora_down_kernel(
    x_ptr, a_ptr, seed_ptr, s_ptr, mask_ptr,
    M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, threshold, span,
    HAS_DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr, FLUSH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s[part] [M, R] = drop(x) @ a.T over columns [part * span, (part + 1) * span); draws and writes the mask."""
    pid_m, part, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    k_begin = (part * span).to(tl.int32)
    k_end = tl.minimum(k_begin + span, K)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        row_bytes = tl.cdiv(K, 8)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if FLUSH > 0:
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        if HAS_DROPOUT:
            offs_b = k // 8 + tl.arange(0, BLOCK_K // 8)
            counter = offs_m[:, None] * row_bytes + offs_b[None, :]
            packed = draw_mask_bytes(seed, counter, threshold, ROUNDS)
            # Further rank blocks draw the same bits again; the first one stores them.
            write = (offs_m[:, None] < M) & (offs_b[None, :] < row_bytes) & (pid_r == 0)
            tl.store(mask_ptr + counter, packed, mask=write)
            x = tl.where(unpack_mask(packed, BLOCK_M, BLOCK_K), x, 0.0)
        a = load_tile(a_ptr, offs_k, offs_r, K, R, stride_ak, stride_ar).to(x.dtype)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
        if FLUSH > 0:
            total, acc = flush_sum(total, acc, (k - k_begin) // BLOCK_K, FLUSH)
    if FLUSH > 0:
        acc += total
    inside = (offs_m[:, None] < M) & (offs_r[None, :] < R)
    s_ptrs = s_ptr + (part * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_bwd_dy_kernel(
    dy_ptr, b_ptr, s_ptr, g_ptr, db_ptr, dbias_ptr,
    M, N, R, stride_dym, stride_dyn, stride_bn, stride_br, span,
    NEED_G: tl.constexpr, NEED_DB: tl.constexpr, NEED_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One read of dy: a program owns `span` rows by BLOCK_N columns and keeps its dlora_b and dbias in registers.

    g [N / BLOCK_N, M, R], db [M / span, N, R] and dbias [M / span, N] are fp32 partial buffers, each written once.
    """
    pid_m, pid_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    if NEED_G:
        b = load_tile(b_ptr, offs_n, offs_r, N, R, stride_bn, stride_br).to(dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    row_end = tl.minimum((pid_m + 1) * span, M)
    for row in range(pid_m * span, row_end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        dy = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, stride_dyn)
        if NEED_DB:
            s = load_tile(s_ptr, offs_m, offs_r, M, R, R, 1)
            db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION)
        if NEED_G:
            g = tl.dot(dy, b, input_precision=PRECISION)
            inside = (offs_m[:, None] < M) & (offs_r[None, :] < R)
            tl.store(g_ptr + (pid_n * M + offs_m[:, None]) * R + offs_r[None, :], g, mask=inside)
        if NEED_DBIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)
    if NEED_DB:
        inside = (offs_n[:, None] < N) & (offs_r[None, :] < R)
        tl.store(db_ptr + (pid_m * N + offs_n[:, None]) * R + offs_r[None, :], db, mask=inside)
    if NEED_DBIAS:
        tl.store(dbias_ptr + pid_m * N + offs_n, dbias, mask=offs_n < N)


@triton.jit
def _lora_bwd_da_kernel(
    x_ptr, g_ptr, mask_ptr, parts_ptr,
    M, K, R, stride_xm, stride_xk, stride_pp, stride_pr, stride_pk, span,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[part] (fp32, [R, K] by strides) = g.T @ drop(x) over rows [part * span, (part + 1) * span)."""
    pid_k, part, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)  # columns first: they fill the wide side of the matrix unit
    row_end = tl.minimum((part + 1) * span, M)
    for row in range(part * span, row_end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        if HAS_MASK:
            x = tl.where(load_mask(mask_ptr, offs_m, pid_k * BLOCK_K, M, K, BLOCK_M, BLOCK_K), x, 0.0)
        g = load_tile(g_ptr, offs_m, offs_r, M, R, R, 1)
        acc = tl.dot(tl.trans(x), g, acc, input_precision=PRECISION)
    inside = (offs_k[:, None] < K) & (offs_r[None, :] < R)
    parts_ptrs = parts_ptr + part * stride_pp + offs_r[None, :] * stride_pr + offs_k[:, None] * stride_pk
    tl.store(parts_ptrs, acc, mask=inside)
