// Scales of a 4-bit weight by chunks of a row: made many at a time, or looked up where they are used. Compiled once per
// instruction set.
#pragma once

#include "../common/nf4_cpu.h"
#include "nf4_linear.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kDotChunk = 64;     // elements of a row of W decoded at a time
constexpr int64_t kCodesAhead = 256;  // scales in 8 bits that are fetched ahead

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

// nf4_scale of several codes under one scale of the second level, from what they stand for.
static inline Float nested_scale(Float level, float scale, float offset) {
  Float product = level * scale;
  __asm__("" : "+v"(product));  // rounded by itself: the compiler may not join it with the sum
  return product + offset;
}

// nf4_scale of `count` blocks from i on, all with double quantisation and under one scale of the second level.
static inline void nested_scales(const Nf4Weight& w, int64_t i, int64_t count, float* scales) {
  int64_t j = 0;
#if defined(__AVX512F__)
  __m512 table[16];
  PK_UNROLL
  for (int k = 0; k < 16; ++k) table[k] = _mm512_loadu_ps(w.nested_code + 16 * k);
  for (; j + 16 <= count; j += 16) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.absmax8 + i + j)));
    store(scales + j, nested_scale((Float)look_up(table, codes), w.nested_absmax[i / kNestedBlock], *w.nested_offset));
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

// Rows of W as they are stored: `packed` are the bytes of chunk 0, and scale(r, i) is that of chunk i, asked for row r of a tile.
// Here scales are there, one a chunk; with Shared, for 1 << shift chunks each.
template <bool Shared = false>
struct ScaledChunks {
  const uint8_t* packed;
  const float* scales;
  int shift = 0;
  PK_INLINE float scale(int, int64_t i) const { return scales[Shared ? i >> shift : i]; }
};

// Double quantisation: what the 256 codes stand for in a group of blocks is in a table, one look-up a chunk, by loads that a
// core makes beside its products. Each row of a tile has two tables, of even and of odd groups: a chain of products ends at most
// one group behind that of its begin.
constexpr int64_t kRowTables = 2 * kNestedBlock;  // floats
template <bool Shared>
struct CodedChunks {
  const uint8_t *packed, *codes;
  const float* tables;
  int shift;
  PK_INLINE float scale(int r, int64_t i) const {
    const int64_t block = Shared ? i >> shift : i;
    return tables[r * kRowTables + (block & kNestedBlock) + codes[block]];
  }
};

// Makes the tables of S rows as these come to new groups.
template <int S>
class CodeTables {
  const Nf4Weight w_;  // to the compiler every store might change what the caller holds
  int shift_;
  float* tables_;
  int64_t ready_[S];  // the last group that has its table

  // nf4_scale of each code.
  void make(int s, int64_t group) const {
    const float scale = w_.nested_absmax[group], offset = *w_.nested_offset;
    float* const table = tables_ + s * kRowTables + (group * kNestedBlock & kNestedBlock);
    for (int64_t code = 0; code < kNestedBlock; code += Vec<float>::lanes)
      store(table + code, nested_scale(load(w_.nested_code + code), scale, offset));
  }

 public:
  CodeTables(const Nf4Weight& w, int shift, float* tables) : w_(w), shift_(shift), tables_(tables) {
    for (int64_t& group : ready_) group = -1;
  }

  // Before the chunks [begin, end) of row s; rows only go on, by a group at most. What has its table keeps it, to save time.
  void operator()(int s, int64_t begin, int64_t end) {
    const int64_t first = (begin >> shift_) / kNestedBlock, last = ((end - 1) >> shift_) / kNestedBlock;
    for (int64_t group = ready_[s] < first ? first : ready_[s] + 1; group <= last; ++group) make(s, group);
    ready_[s] = last;
    __builtin_prefetch(w_.absmax8 + (begin >> shift_) + kCodesAhead);
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
