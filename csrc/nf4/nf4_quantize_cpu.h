// One block of elements, or of scales, quantised. Compiled once per instruction set.
//
// The codes of a vector are found by a binary search in the thresholds, which lie in registers: a permute and a comparison for
// each bit of a code. Elements are taken 32 at a time, the smallest block.
#pragma once

#include "../common/nf4_cpu.h"
#include "../common/output_memory.h"
#include "nf4.h"

namespace peft_kernels {
namespace PK_ISA {

using Ints = Vec<int32_t>::type;

constexpr int64_t kGroup = 32;

#if defined(__AVX512F__)
// Of the search's table for a step: lane i is bound[i + ahead], where there is one.
static inline __m512 nf4_bounds(const float* bound, int count, int ahead) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << (count - ahead)) - 1), bound + ahead);
}

// The next bit of each lane's code, from the lanes of `table` that the bits found so far name.
static inline __m512i nf4_bit(__m512 x, __m512 table, __m512i code, int bit) {
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(code, table), _CMP_GT_OQ);
  return _mm512_mask_or_epi32(code, above, code, _mm512_set1_epi32(bit));
}

struct Nf4Search {
  __m512 bound8 = _mm512_set1_ps(kNf4.bound[7]), bound4 = nf4_bounds(kNf4.bound, 15, 3), bound2 = nf4_bounds(kNf4.bound, 15, 1),
         bound1 = nf4_bounds(kNf4.bound, 15, 0);
  Ints operator()(Float v) const {
    const __m512 x = (__m512)v;
    __m512i code = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, bound8, _CMP_GT_OQ), 8);
    code = nf4_bit(x, bound4, code, 4);
    code = nf4_bit(x, bound2, code, 2);
    return (Ints)nf4_bit(x, bound1, code, 1);
  }
};

struct Fp4Search {
  __m512 bound4 = _mm512_set1_ps(kFp4.bound[3]), bound2 = nf4_bounds(kFp4.bound, 7, 1), bound1 = nf4_bounds(kFp4.bound, 7, 0);
  __m512i codes = _mm512_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFp4Codes)));
  Ints operator()(Float v) const {
    const __m512 x = (__m512)v, size = _mm512_abs_ps(x);
    __m512i code = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(size, bound4, _CMP_GT_OQ), 4);
    code = nf4_bit(size, bound2, code, 2);
    code = _mm512_permutexvar_epi32(nf4_bit(size, bound1, code, 1), codes);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return (Ints)_mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
  }
};
#elif defined(__AVX2__)
// The table of a step with n possible values so far: lane i is bound[first + i * apart].
static inline __m256 nf4_bounds(const float* bound, int n, int first, int apart) {
  float lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = bound[first + i * apart];
  return _mm256_loadu_ps(lanes);
}

// Twice the code, and one more where x is above: the bits found so far are the index of the table's lane.
static inline __m256i nf4_bit(__m256 x, __m256 table, __m256i code) {
  const __m256 above = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(table, code), _CMP_GT_OQ);
  return _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(above));
}

struct Nf4Search {
  __m256 bound8 = nf4_bounds(kNf4.bound, 1, 7, 0), bound4 = nf4_bounds(kNf4.bound, 2, 3, 8),
         bound2 = nf4_bounds(kNf4.bound, 4, 1, 4), bound1 = nf4_bounds(kNf4.bound, 8, 0, 2);
  Ints operator()(Float v) const {
    const __m256 x = (__m256)v;
    const __m256i code = nf4_bit(x, bound4, nf4_bit(x, bound8, _mm256_setzero_si256()));
    return (Ints)nf4_bit(x, bound1, nf4_bit(x, bound2, code));
  }
};

struct Fp4Search {
  __m256 bound4 = nf4_bounds(kFp4.bound, 1, 3, 0), bound2 = nf4_bounds(kFp4.bound, 2, 1, 4),
         bound1 = nf4_bounds(kFp4.bound, 4, 0, 2);
  __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFp4Codes)));
  Ints operator()(Float v) const {
    const __m256 x = (__m256)v, size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256i rank = nf4_bit(size, bound1, nf4_bit(size, bound2, nf4_bit(size, bound4, _mm256_setzero_si256())));
    const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
    return (Ints)_mm256_or_si256(_mm256_permutevar8x32_epi32(codes, rank), _mm256_and_si256(negative, _mm256_set1_epi32(8)));
  }
};
#else
struct Nf4Search {
  Ints operator()(Float x) const {  // how many bounds are below
    Ints code{};
    PK_UNROLL
    for (int i = 0; i < 15; ++i) code -= (Ints)(x > kNf4.bound[i]);
    return code;
  }
};

struct Fp4Search {
  Ints operator()(Float x) const {
    const Float size = (Float)((Bits)x & 0x7FFFFFFFu);
    // From one rank to the next the code changes by a number that is known.
    Ints code{};
    PK_UNROLL
    for (int i = 0; i < 7; ++i) code += (Ints)(size > kFp4.bound[i]) & (kFp4Codes[i + 1] - kFp4Codes[i]);
    return code + ((Ints)(x < 0) & 8);
  }
};
#endif

// The larger of the magnitudes by their bits, whose order is that of the numbers: infinity above all of them, NaN above it.
template <class U>
static inline typename Vec<U>::type larger(typename Vec<U>::type a, typename Vec<U>::type b) {
  return a > b ? a : b;
}

static inline float from_bits(int32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
static inline float number(float, int32_t bits) { return from_bits(bits); }
static inline float number(bf16, int32_t bits) { return to_float(bf16{static_cast<uint16_t>(bits)}); }
static inline float number(f16, int32_t bits) { return to_float(f16{static_cast<uint16_t>(bits)}); }

template <class T>
struct BitsAs {
  using type = int16_t;
  static constexpr int16_t magnitude = 0x7FFF;
};
template <>
struct BitsAs<float> {
  using type = int32_t;
  static constexpr int32_t magnitude = 0x7FFFFFFF;
};

// The largest magnitude of n elements; NaN if one is.
template <class T>
static inline float largest(const T* values, int64_t n) {
  using U = typename BitsAs<T>::type;
  using V = typename Vec<U>::type;
  constexpr int64_t W = Vec<U>::lanes;
  const U* p = reinterpret_cast<const U*>(values);
  V most{};
  int64_t i = 0;
  for (; i + W <= n; i += W) most = larger<U>(most, (V)load(p + i) & BitsAs<T>::magnitude);
  if (i < n) {
    U rest[W] = {};
    memcpy(rest, p + i, (n - i) * sizeof(U));
    most = larger<U>(most, (V)load(rest) & BitsAs<T>::magnitude);
  }
  U lanes[W];
  store(lanes, most);
  U top = 0;
  for (int64_t j = 0; j < W; ++j) top = lanes[j] > top ? lanes[j] : top;
  return number(T{}, top);
}

// The 32 codes as 16 bytes, each an even element above an odd one.
static inline void pack_group(const Ints* code, uint8_t* packed) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_packs_epi32((__m512i)code[0], (__m512i)code[1]);  // four of each in turn
  const __m512i bytes = _mm512_madd_epi16(words, _mm512_set1_epi32(1 << 16 | 16));
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(bytes), order));
#elif defined(__AVX2__)
  const __m256i by = _mm256_set1_epi32(1 << 16 | 16);
  const __m256i a = _mm256_madd_epi16(_mm256_packs_epi32((__m256i)code[0], (__m256i)code[1]), by);
  const __m256i b = _mm256_madd_epi16(_mm256_packs_epi32((__m256i)code[2], (__m256i)code[3]), by);
  const __m256i words = _mm256_packs_epi32(a, b);  // the lower halves, two bytes of each vector in turn, then the upper ones
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(bytes, order));
#else
  int32_t codes[kGroup];
  for (int64_t i = 0; i < kGroup; i += Vec<int32_t>::lanes) store(codes + i, code[i / Vec<int32_t>::lanes]);
  for (int64_t i = 0; i < kGroup / 2; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
#endif
}

// checked: values * inverse may be NaN, which counts as 0: infinity times zero.
template <bool checked, class Search, class T>
static inline void quantize_group(const Search& search, const T* values, float inverse, uint8_t* packed) {
  constexpr int64_t W = Vec<float>::lanes;
  Ints code[kGroup / W];
  PK_UNROLL
  for (int64_t i = 0; i < kGroup / W; ++i) {
    Float scaled = widen(values + i * W) * inverse;
    if constexpr (checked) scaled = scaled == scaled ? scaled : Float{};
    code[i] = search(scaled);
  }
  pack_group(code, packed);
}

template <bool checked, class Search, class T>
static inline void quantize_values(const Search& search, const T* values, int64_t n, float inverse, uint8_t* packed) {
  for (; n >= kGroup; n -= kGroup, values += kGroup, packed += kGroup / 2)
    quantize_group<checked>(search, values, inverse, packed);
  if (n > 0) {
    T some[kGroup] = {};
    uint8_t bytes[kGroup / 2];
    memcpy(some, values, n * sizeof(T));
    quantize_group<checked>(search, some, inverse, bytes);
    memcpy(packed, bytes, (n + 1) / 2);
  }
}

// packed and absmax of the blocks of `count` elements; only the last block may be shorter.
template <class Search, class T>
static inline void quantize_blocks(const T* values, int64_t count, int64_t blocksize, uint8_t* packed, float* absmax) {
  const Search search;
  for (; count > 0; count -= blocksize, values += blocksize, packed += blocksize / 2) {
    const int64_t n = min64(blocksize, count);
    const float most = *absmax++ = largest(values, n), inverse = 1 / most;
    if (inverse > 0 && inverse <= 3.402823466e+38f)
      quantize_values<false>(search, values, n, inverse, packed);
    else
      quantize_values<true>(search, values, n, inverse, packed);
  }
}

// The absmax of n scales less their offset, at most a block of them, and their codes: how many of the 255 bounds are below.
// One bit of all codes at a time, so that no step waits for the one before it.
static inline float quantize_scale_block(const float* scale, int64_t n, float offset, const float* bound, uint8_t* codes) {
  float values[kNestedBlock];
  int32_t code[kNestedBlock] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = scale[i] - offset;
  const float most = largest(values, n), inverse = 1 / most;
  for (int64_t i = 0; i < n; ++i) values[i] *= inverse;
  for (int32_t bit = 128; bit > 0; bit /= 2)
    for (int64_t i = 0; i < n; ++i) code[i] += bit * (values[i] > bound[code[i] + bit - 1]);
  // NaN is above none: a block of equal scales, whose absmax is 0.
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(code[i]);
  return most;
}

}  // namespace PK_ISA
}  // namespace peft_kernels
