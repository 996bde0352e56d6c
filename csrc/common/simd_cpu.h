// Vectors, storage types and row conversion, compiled once per instruction set.
//
// Everything lives in a namespace named after the instruction set (PK_ISA), so that the linker cannot merge the AVX-512
// copy of a function with the portable one. No standard-library templates here, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PK_ISA
#error "compile with -DPK_ISA=<portable|avx2|avx512|avx512bf16>"
#endif

#if defined(__AVX512F__)
#define PK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PK_VECTOR_BYTES 32
#else
#define PK_VECTOR_BYTES 16
#endif

#define PK_UNROLL _Pragma("GCC unroll 32")
// Where a call would pass vectors through memory and load every constant again.
#define PK_INLINE __attribute__((always_inline)) inline

namespace peft_kernels {
namespace PK_ISA {

template <class T>
struct Vec {
  typedef T type __attribute__((vector_size(PK_VECTOR_BYTES)));
  typedef T loose __attribute__((vector_size(PK_VECTOR_BYTES), aligned(2), may_alias));
  static constexpr int lanes = PK_VECTOR_BYTES / sizeof(T);
};

template <class T>
static inline typename Vec<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::loose*>(p);
}

template <class T>
static inline void store(T* p, typename Vec<T>::type v) {
  *reinterpret_cast<typename Vec<T>::loose*>(p) = v;
}

// What was stored past the caches is seen by other threads after this.
static inline void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// may_alias: rows of them are read as steps of two.
struct __attribute__((may_alias)) bf16 {
  uint16_t bits;
};
struct __attribute__((may_alias)) f16 {
  uint16_t bits;
};

static inline float to_float(bf16 h) {
  const uint32_t u = static_cast<uint32_t>(h.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline bf16 to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return bf16{static_cast<uint16_t>(nan ? 0x7FC0u : rounded)};
}

static inline float to_float(f16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  // Shifting the fp16 bits into place leaves an exponent that is 112 too small; one multiplication mends it, subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7FFFu) << 13;
  float f;
  memcpy(&f, &magnitude, 4);
  f *= 5192296858534827628530496329220096.0f;  // 2^112
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((h.bits & 0x7C00u) == 0x7C00u) u = magnitude | 0x7F800000u;  // inf, NaN
  u |= static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  memcpy(&f, &u, 4);
  return f;
#endif
}

static inline f16 to_f16(float f) {
#if defined(__F16C__)
  return f16{static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return f16{static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return f16{static_cast<uint16_t>(sign | 0x7C00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded result in the low bits
    float g;
    memcpy(&g, &magnitude, 4);
    g += 0.5f;
    uint32_t v;
    memcpy(&v, &g, 4);
    return f16{static_cast<uint16_t>(sign | (v - 0x3F000000u))};
  }
  const uint32_t rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  return f16{static_cast<uint16_t>(sign | rounded)};
#endif
}

// Contiguous conversion between what is stored and what is computed with.
static inline void convert(float* dst, const float* src, int64_t n) { memcpy(dst, src, n * sizeof(float)); }
static inline void convert(double* dst, const double* src, int64_t n) { memcpy(dst, src, n * sizeof(double)); }
static inline void convert(bf16* dst, const bf16* src, int64_t n) { memcpy(dst, src, n * sizeof(bf16)); }

static inline void convert(float* dst, const bf16* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}

static inline void convert(bf16* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_bf16(src[i]);
}

static inline void convert(float* dst, const f16* src, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#endif
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

static inline void convert(f16* dst, const float* src, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) dst[i] = to_f16(src[i]);
}

#if !defined(__clang__)
// Swaps the off-diagonal blocks of size H in every 2 H x 2 H block of W rows, then those half as large.
template <class U, int H>
static inline void swap_blocks(typename Vec<U>::type* row) {
  constexpr int W = Vec<U>::lanes;
  typename Vec<U>::type upper, lower;
  PK_UNROLL
  for (int j = 0; j < W; ++j) {
    upper[j] = j & H ? W + j - H : j;
    lower[j] = j & H ? W + j : j + H;
  }
  PK_UNROLL
  for (int i = 0; i < W; ++i)
    if (!(i & H)) {
      const typename Vec<U>::type a = row[i], b = row[i + H];
      row[i] = __builtin_shuffle(a, b, upper);
      row[i + H] = __builtin_shuffle(a, b, lower);
    }
  if constexpr (H > 1) swap_blocks<U, H / 2>(row);
}
#endif

// dst[j][i] = src[i][j] for W x W elements, W the lanes of a vector; only the first `rows` rows of dst are written.
template <class U>
static inline void transpose_block(const U* src, int64_t src_ld, U* dst, int64_t dst_ld, int64_t rows) {
  constexpr int W = Vec<U>::lanes;
#if defined(__clang__)  // has no shuffle by a vector of indices
  for (int j = 0; j < W && j < rows; ++j)
    for (int i = 0; i < W; ++i) dst[j * dst_ld + i] = src[i * src_ld + j];
#else
  typename Vec<U>::type row[W];
  PK_UNROLL
  for (int i = 0; i < W; ++i) row[i] = load(src + i * src_ld);
  swap_blocks<U, W / 2>(row);
  if (rows >= W) {
    PK_UNROLL
    for (int i = 0; i < W; ++i) store(dst + i * dst_ld, row[i]);
  } else {
    PK_UNROLL
    for (int i = 0; i < W; ++i)
      if (i < rows) store(dst + i * dst_ld, row[i]);
  }
#endif
}

}  // namespace PK_ISA
}  // namespace peft_kernels
