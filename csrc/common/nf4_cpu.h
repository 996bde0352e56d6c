// Reading 4-bit weights on a CPU: scales of blocks, and elements decoded to a row in memory. Compiled once per instruction set.
//
// A block has sixteen values. They are made once (a product and a rounding of sixteen lanes) and looked up by permutes, so the
// results are those of formats/nf4_values.py bit for bit and cost one lookup each.
#pragma once

#include "blocks_cpu.h"
#include "nf4.h"
#include "vector_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

// The product as a number of its own: the compiler may not join it with a sum behind it, which would round once, not twice.
static inline float nf4_rounded(float product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
  return product;
#else
  volatile float kept = product;
  return kept;
#endif
}

static inline float nf4_scale(const Nf4Weight& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return nf4_rounded(w.nested_code[w.absmax8[block]] * w.nested_absmax[block / kNestedBlock]) + *w.nested_offset;
}

static inline const float* nf4_levels(const Nf4Weight& w) { return w.fp4 ? kFp4.level : kNf4.level; }

static inline void nf4_narrow(double* p, float v) { *p = v; }
static inline void nf4_narrow(float* p, float v) { *p = v; }
static inline void nf4_narrow(bf16* p, float v) { *p = to_bf16(v); }
static inline void nf4_narrow(f16* p, float v) { *p = to_f16(v); }

// The sixteen values of a block in a type of output. look_up() writes `step` elements, those of the step / 2 bytes at `packed`.
template <class T>
struct Nf4Table {  // any type, any instruction set
  static constexpr int64_t step = 32;
  T value[16];
  Nf4Table(const float* level, float scale) {
    for (int i = 0; i < 16; ++i) nf4_narrow(value + i, level[i] * scale);
  }
  void look_up(const uint8_t* packed, T* out, Way) const {
    PK_UNROLL
    for (int64_t i = 0; i < step / 2; ++i) out[2 * i] = value[packed[i] >> 4], out[2 * i + 1] = value[packed[i] & 15];
  }
};

#if defined(__AVX512F__)
// Permutes look at the lowest bits of an index alone (4 of 16 lanes, 5 of 32, whose halves are the same): a lane may hold what
// it likes above its code, so a byte and the same byte four bits lower are both indices as they are.
template <>
struct Nf4Table<float> {
  static constexpr int64_t step = 16;
  __m512 value;
  Nf4Table(const float* level, float scale) : value((__m512)(load(level) * scale)) {}
  void look_up(const uint8_t* packed, float* out, Way way) const {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    move(out, _mm512_castps_si512(_mm512_permutexvar_ps(index, value)), way);
  }
};

// As put() rounds them, but left in a register: from memory the table would come back late.
static inline __m256i words_of(f16, __m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256i words_of(bf16, __m512 v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000)), 16));
}

template <class T>
struct Nf4Words {
  static constexpr int64_t step = 32;
  __m512i value;
  Nf4Words(const float* level, float scale) {
    value = _mm512_broadcast_i64x4(words_of(T{}, (__m512)(load(level) * scale)));
  }
  void look_up(const uint8_t* packed, T* out, Way way) const {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    move(out, _mm512_permutexvar_epi16(index, value), way);
  }
};
#elif defined(__AVX2__)
template <>
struct Nf4Table<float> {
  static constexpr int64_t step = 8;
  __m256 low, high;
  Nf4Table(const float* level, float scale)
      : low((__m256)(load(level) * scale)), high((__m256)(load(level + 8) * scale)) {}
  void look_up(const uint8_t* packed, float* out, Way way) const {  // bit 3 of a code says which half it is in
    int four;
    memcpy(&four, packed, 4);
    const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), half);
    move(out, _mm256_castps_si256(found), way);
  }
};

template <class T>
struct Nf4Words {  // low and high bytes looked up apart
  static constexpr int64_t step = 32;
  __m256i low, high;
  Nf4Words(const float* level, float scale) {
    T words[16];
    put(words, load(level) * scale, Way::cached), put(words + 8, load(level + 8) * scale, Way::cached);
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 8)), byte = _mm_set1_epi16(0xFF);
    low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
  }
  void look_up(const uint8_t* packed, T* out, Way way) const {
    // Each byte twice, in the order in which the unpacking below, half by half, brings the elements into theirs.
    const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11,  //
                                           4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m256i pair = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), twice);
    const __m256i index = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(pair, 4), _mm256_set1_epi16(0x000F)),
                                          _mm256_and_si256(pair, _mm256_set1_epi16(0x0F00)));
    const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
    move(out, _mm256_unpacklo_epi8(lows, highs), way);
    move(out + 16, _mm256_unpackhi_epi8(lows, highs), way);
  }
};
#endif

#if defined(__AVX2__)
template <>
struct Nf4Table<bf16> : Nf4Words<bf16> {
  using Nf4Words::Nf4Words;
};
template <>
struct Nf4Table<f16> : Nf4Words<f16> {
  using Nf4Words::Nf4Words;
};
#endif

// Elements [begin, end) of the flat tensor, all of one block of this scale. Reads no byte but theirs. Past the caches `out` is
// on 64 bytes, and begin a multiple of 64; what does not fill a step goes through them.
template <Way way = Way::cached, class T>
static inline void nf4_decode_block(const uint8_t* packed, const float* level, float scale, int64_t begin, int64_t end,
                                    T* out) {
  const Nf4Table<T> table(level, scale);
  constexpr int64_t step = Nf4Table<T>::step;
  if (begin & 1) nf4_narrow(out++, level[packed[begin >> 1] & 15] * scale), ++begin;
  const uint8_t* bytes = packed + (begin >> 1);
  int64_t left = end - begin;
  for (; left >= step; left -= step, bytes += step / 2, out += step) table.look_up(bytes, out, way);
  if (left > 0) {
    uint8_t some[step / 2] = {};
    T values[step];
    memcpy(some, bytes, (left + 1) / 2);
    table.look_up(some, values, Way::cached);
    memcpy(out, values, left * sizeof(T));
  }
}

// Whole blocks from `block` on. Where `size`, the blocksize, is known to the compiler, a block's lookups are laid out in a row.
template <Way way, int64_t size, class T>
static inline void nf4_decode_blocks(const Nf4Weight& w, const float* level, int64_t block, int64_t blocks, T* out) {
  constexpr int64_t step = Nf4Table<T>::step;
  const int64_t blocksize = size ? size : w.blocksize;
  const uint8_t* bytes = w.packed + block * blocksize / 2;
  for (const int64_t end = block + blocks; block < end; ++block, bytes += blocksize / 2, out += blocksize) {
    const Nf4Table<T> table(level, nf4_scale(w, block));
    if constexpr (size > 0) {
      PK_UNROLL
      for (int64_t i = 0; i < size; i += step) table.look_up(bytes + i / 2, out + i, way);
    } else {
      for (int64_t i = 0; i < blocksize; i += step) table.look_up(bytes + i / 2, out + i, way);
    }
  }
}

// out[0, count) = elements [start, start + count) of the flat tensor, for any start: float, bf16, f16, or double, which holds
// the fp32 values. The same bits wherever a range begins and ends. Past the caches as in nf4_decode_block.
template <Way way = Way::cached, class T>
static inline void nf4_decode(const Nf4Weight& weight, int64_t start, int64_t count, T* out) {
  const Nf4Weight w = weight;  // to the compiler every store might change what the caller holds
  const float* level = nf4_levels(w);
  const int64_t end = start + count, mask = w.blocksize - 1;
  const int shift = __builtin_ctzll(w.blocksize);
  // Up to the first block's end, whole blocks, and what is left.
  const int64_t head = min64((start + mask) & ~mask, end), tail = head + ((end - head) & ~mask);
  if (start < head) nf4_decode_block<way>(w.packed, level, nf4_scale(w, start >> shift), start, head, out);
  if (w.blocksize == 64)
    nf4_decode_blocks<way, 64>(w, level, head >> shift, (tail - head) >> shift, out + (head - start));
  else
    nf4_decode_blocks<way, 0>(w, level, head >> shift, (tail - head) >> shift, out + (head - start));
  if (tail < end) nf4_decode_block<way>(w.packed, level, nf4_scale(w, tail >> shift), tail, end, out + (tail - start));
}

}  // namespace PK_ISA
}  // namespace peft_kernels
