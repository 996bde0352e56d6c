// Scales of a 4-bit weight by chunks of a row, made many at a time. Compiled once per instruction set.
#pragma once

#include "../common/nf4_cpu.h"
#include "nf4_linear.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kDotChunk = 64;  // elements of a row of W decoded at a time

// Chunks must be there, begin on bytes and lie in one block each, to be decoded on the way.
static inline bool in_chunks(const Nf4Linear& f) {
  return f.K > 0 && f.K % kDotChunk == 0 && f.weight.blocksize >= kDotChunk;
}

#if defined(__AVX512F__)
// table[codes] of 256 floats: a gather takes four times as long, and loads one by one into memory are read back late.
static inline __m512 look_up(const __m512* table, __m512i codes) {
  __m512 of[8];  // by the lower five bits, of each 32
  PK_UNROLL
  for (int i = 0; i < 8; ++i) of[i] = _mm512_permutex2var_ps(table[2 * i], codes, table[2 * i + 1]);
  PK_UNROLL
  for (int bit = 5; bit < 8; ++bit) {
    const __mmask16 upper = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(1 << bit));
    PK_UNROLL
    for (int i = 0; i < 128 >> bit; ++i) of[i] = _mm512_mask_blend_ps(upper, of[2 * i], of[2 * i + 1]);
  }
  return of[0];
}
#endif

// nf4_scale of `count` blocks from i on, all with double quantisation and under one scale of the second level.
static inline void nested_scales(const Nf4Weight& w, int64_t i, int64_t count, float* scales) {
  int64_t j = 0;
#if defined(__AVX512F__)
  __m512 table[16];
  PK_UNROLL
  for (int k = 0; k < 16; ++k) table[k] = _mm512_loadu_ps(w.nested_code + 16 * k);
  for (; j + 16 <= count; j += 16) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.absmax8 + i + j)));
    __m512 product = _mm512_mul_ps(look_up(table, codes), _mm512_set1_ps(w.nested_absmax[i / kNestedBlock]));
    __asm__("" : "+v"(product));  // rounded by itself: the compiler may not join it with the sum
    _mm512_storeu_ps(scales + j, _mm512_add_ps(product, _mm512_set1_ps(*w.nested_offset)));
  }
#endif
  for (; j < count; ++j) scales[j] = nf4_scale(w, i + j);
}

// Whether the scale of each chunk lies in its place.
static inline bool has_chunk_scales(const Nf4Weight& w) { return w.absmax && w.blocksize == kDotChunk; }

// The scales of `count` chunks of the flat tensor from chunk i on.
static inline void make_chunk_scales(const Nf4Weight& weight, int64_t i, int64_t count, float* scales) {
  const Nf4Weight w = weight;  // to the compiler every store might change what the caller holds
  const int shift = __builtin_ctzll(w.blocksize / kDotChunk);
  const int64_t end = i + count;
  while (shift == 0 && w.absmax8 && i < end) {
    const int64_t stop = min64(end, round_up(i + 1, kNestedBlock));
    nested_scales(w, i, stop - i, scales);
    scales += stop - i, i = stop;
  }
  for (; i < end; ++i, ++scales) *scales = nf4_scale(w, i >> shift);
}

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
