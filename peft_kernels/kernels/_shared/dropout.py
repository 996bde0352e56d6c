"""The packed dropout mask in Triton: one bit per element, eight elements per Philox call (reference.dropout_mask)."""

import triton
import triton.language as tl


@triton.jit
def draw_mask_bytes(seed, counter, threshold, ROUNDS: tl.constexpr):
    """int64 counters of any shape -> uint8 mask bytes; bit j is (16-bit lane j >= threshold)."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero, ROUNDS)
    bits = ((w0 & 0xFFFF) >= threshold).to(tl.int32)
    bits |= ((w1 & 0xFFFF) >= threshold).to(tl.int32) << 1
    bits |= ((w2 & 0xFFFF) >= threshold).to(tl.int32) << 2
    bits |= ((w3 & 0xFFFF) >= threshold).to(tl.int32) << 3
    bits |= ((w0 >> 16) >= threshold).to(tl.int32) << 4
    bits |= ((w1 >> 16) >= threshold).to(tl.int32) << 5
    bits |= ((w2 >> 16) >= threshold).to(tl.int32) << 6
    bits |= ((w3 >> 16) >= threshold).to(tl.int32) << 7
    return bits.to(tl.uint8)


@triton.jit
def unpack_mask(mask_bytes, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint8 [BLOCK_M, BLOCK_K / 8] -> bool [BLOCK_M, BLOCK_K]."""
    # Eight neighbours share a byte, as eight 16-bit elements share one 128-bit load: no data moves between threads.
    bits = mask_bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def load_mask(mask_ptr, offs_m, k_start, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows offs_m (int64) and columns k_start.. (a multiple of 8) of a packed mask [M, ceil(K / 8)] -> bool tile."""
    row_bytes = tl.cdiv(K, 8)
    offs_b = k_start // 8 + tl.arange(0, BLOCK_K // 8)
    inside = (offs_m[:, None] < M) & (offs_b[None, :] < row_bytes)
    packed = tl.load(mask_ptr + offs_m[:, None] * row_bytes + offs_b[None, :], mask=inside, other=0)
    return unpack_mask(packed, BLOCK_M, BLOCK_K)
