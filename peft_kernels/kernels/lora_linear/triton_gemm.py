"""The LoRA GEMM in Triton: c = p @ q + alpha * drop(l @ t) + bias; q is weight.T in the forward, weight in dx."""

import triton
import triton.language as tl

from .._shared.dropout import load_mask
from .._shared.sums import flush_sum
from .._shared.tiles import grouped_tile, load_tile


@triton.jit
def _low_rank_tile(
    l_ptr, t_ptr, mask_ptr, alpha, offs_m, offs_n, n_start, M, N, R, stride_tr, stride_tn, DTYPE: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, R_BLOCKS: tl.constexpr,
):  # fmt: skip
    """alpha * drop(l @ t) for one tile, in fp32: l [M, R] contiguous, t [R, N] of any dtype and strides."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in tl.range(0, R_BLOCKS, num_stages=1):
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        left = load_tile(l_ptr, offs_m, offs_r, M, R, R, 1)
        right = load_tile(t_ptr, offs_r, offs_n, R, N, stride_tr, stride_tn).to(DTYPE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc *= alpha
    if HAS_MASK:
        acc = tl.where(load_mask(mask_ptr, offs_m, n_start, M, N, BLOCK_M, BLOCK_N), acc, 0.0)
    return acc


@triton.jit
def _add_base_tile(
    acc, p, q, offs_m, offs_n, m_start, n_start, M, N, K, stride_pm, stride_pk, stride_qk, stride_qn,
    Q_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FLUSH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + p @ q for one tile. Descriptors read outside as zero; Q_TRANSPOSED: q's descriptor is over [N, K]."""
    if FLUSH > 0:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            left = p.load([m_start, k])
            right = tl.trans(q.load([n_start, k])) if Q_TRANSPOSED else q.load([k, n_start])
        else:
            offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
            left = load_tile(p, offs_m, offs_k, M, K, stride_pm, stride_pk)
            right = load_tile(q, offs_k, offs_n, K, N, stride_qk, stride_qn)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if FLUSH > 0:
            total, acc = flush_sum(total, acc, k // BLOCK_K, FLUSH)
    if FLUSH > 0:
        acc += total
    return acc


@triton.jit
def _store_tile(
    acc, c, bias_ptr, offs_m, n_start, m_start, M, N, stride_cm,
    HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the bias and round once to c's dtype."""
    offs_n = n_start + tl.arange(0, BLOCK_N).to(tl.int64)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if DESCRIPTORS:
        c.store([m_start, n_start], acc.to(DTYPE))
    else:
        inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(c + offs_m[:, None] * stride_cm + offs_n[None, :], acc.to(DTYPE), mask=inside)


@triton.jit
def _lora_gemm_kernel(
    p, q, l_ptr, t_ptr, mask_ptr, bias_ptr, c,
    alpha, M, N, K, R, stride_pm, stride_pk, stride_qk, stride_qn, stride_tr, stride_tn, stride_cm,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, Q_TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FLUSH: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Persistent: each program walks tiles of c [M, N]. The accumulator starts with the low-rank product (K-extension).

    p, q and c are tensor descriptors with DESCRIPTORS, else pointers. HAS_BASE off leaves p @ q out.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m_start, n_start = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = m_start + tl.arange(0, BLOCK_M).to(tl.int64)
        offs_n = n_start + tl.arange(0, BLOCK_N).to(tl.int64)
        acc = _low_rank_tile(
            l_ptr, t_ptr, mask_ptr, alpha, offs_m, offs_n, n_start, M, N, R, stride_tr, stride_tn,
            DTYPE, HAS_MASK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, R_BLOCKS,
        )  # fmt: skip
        if HAS_BASE:
            acc = _add_base_tile(
                acc, p, q, offs_m, offs_n, m_start, n_start, M, N, K, stride_pm, stride_pk, stride_qk, stride_qn,
                Q_TRANSPOSED, DESCRIPTORS, PRECISION, FLUSH, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if SUBTILES == 1:
            _store_tile(
                acc, c, bias_ptr, offs_m, n_start, m_start, M, N, stride_cm, HAS_BIAS, DESCRIPTORS, DTYPE, BLOCK_N
            )
        else:  # two halves: the store's staging buffer in shared memory is half as large
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            first, second = tl.split(halves)
            HALF: tl.constexpr = BLOCK_N // 2
            _store_tile(
                first, c, bias_ptr, offs_m, n_start, m_start, M, N, stride_cm, HAS_BIAS, DESCRIPTORS, DTYPE, HALF
            )
            _store_tile(
                second, c, bias_ptr, offs_m, n_start + HALF, m_start, M, N, stride_cm,
                HAS_BIAS, DESCRIPTORS, DTYPE, HALF,
            )  # fmt: skip
