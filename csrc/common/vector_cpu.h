// One vector of fp32 at a time from and to memory, in any type, through the caches or past them. Compiled once per instruction
// set.
#pragma once

#include "simd_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

using Float = Vec<float>::type;
using Bits = Vec<uint32_t>::type;

// __builtin_convertvector would do, but GCC 12 makes four instructions of it where the set has one.
static inline Bits widen_bits(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Bits v{};
  for (int64_t i = 0; i < Vec<float>::lanes; ++i) v[i] = p[i];
  return v;
#endif
}

static inline Float widen(const float* p) { return load(p); }
static inline Float widen(const bf16* p) { return (Float)(widen_bits(&p->bits) << 16); }

static inline Float widen(const f16* p) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float wide[Vec<float>::lanes];
  convert(wide, p, Vec<float>::lanes);
  return load(wide);
#endif
}

// Where a vector goes: into memory through the caches, or past them, for what nobody reads again soon.
enum class Way { cached, past };

#if defined(__AVX512F__)
static inline void move(void* p, __m512i v, Way way) {
  if (way == Way::past) return _mm512_stream_si512(static_cast<__m512i*>(p), v);
  _mm512_storeu_si512(p, v);
}
#endif
#if defined(__AVX2__)
static inline void move(void* p, __m256i v, Way way) {
  if (way == Way::past) return _mm256_stream_si256(static_cast<__m256i*>(p), v);
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
static inline void move(void* p, __m128i v, Way way) {
  if (way == Way::past) return _mm_stream_si128(static_cast<__m128i*>(p), v);
  _mm_storeu_si128(static_cast<__m128i*>(p), v);
}
#endif

// What went past the caches is seen by other threads after this.
static inline void close(Way way) {
  if (way == Way::past) finish_stores();
}

// Stores v rounded; what was stored comes back.
static inline Float put(float* p, Float v, Way way) {
#if defined(__AVX512F__)
  move(p, (__m512i)v, way);
#elif defined(__AVX2__)
  move(p, (__m256i)v, way);
#else
  (void)way;
  store(p, v);
#endif
  return v;
}

static inline Float put(bf16* p, Float v, Way way) {
  const Bits u = (Bits)v, rounded = u + 0x7FFFu + ((u >> 16) & 1u);
  const Bits high = (v == v ? rounded : Bits{} + 0x7FC00000u) >> 16;
#if defined(__AVX512F__)
  move(p, _mm512_cvtepi32_epi16((__m512i)high), way);
#elif defined(__AVX2__)
  move(p, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)high), _mm256_extracti128_si256((__m256i)high, 1)), way);
#else
  (void)way;
  for (int64_t i = 0; i < Vec<float>::lanes; ++i) p[i].bits = static_cast<uint16_t>(high[i]);
#endif
  return (Float)(high << 16);
}

static inline Float put(f16* p, Float v, Way way) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  move(p, half, way);
  return (Float)_mm512_cvtph_ps(half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  move(p, half, way);
  return (Float)_mm256_cvtph_ps(half);
#else
  (void)way;
  float wide[Vec<float>::lanes];
  store(wide, v);
  convert(p, wide, Vec<float>::lanes);
  return widen(p);
#endif
}

}  // namespace PK_ISA
}  // namespace peft_kernels
