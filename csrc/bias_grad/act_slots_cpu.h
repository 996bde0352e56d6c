// One slot of columns on a CPU: what an activation's backward makes of it, and how it is stored. Compiled once per
// instruction set.
#pragma once

#include "../common/activations_cpu.h"
#include "../common/column_sum_cpu.h"
#include "../common/output_memory.h"

namespace peft_kernels {
namespace PK_ISA {

// ---- storing ----

#if defined(__AVX512F__)
PK_INLINE static void store_line(void* p, Floats v, bool uncached) {
  uncached ? _mm512_stream_ps(static_cast<float*>(p), (__m512)v) : _mm512_storeu_ps(p, (__m512)v);
}
#elif defined(__AVX2__)
PK_INLINE static void store_line(void* p, Floats v, bool uncached) {
  uncached ? _mm256_stream_ps(static_cast<float*>(p), (__m256)v) : _mm256_storeu_ps(static_cast<float*>(p), (__m256)v);
}
#else
PK_INLINE static void store_line(void* p, Floats v, bool) { store(static_cast<float*>(p), v); }
#endif

// To nearest, in the upper half of each word; the lower half is left over.
PK_INLINE static Words bf16_bits(Floats v) {
  const Words bits = (Words)v, rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return v != v ? Words{} + 0x7FC00000u : rounded;
}

PK_INLINE static void store_rounded(float* p, Pair v, bool uncached) {
  store_line(p, v.a, uncached);
  store_line(p + kLanes, v.b, uncached);
}

// Of numbers that bf16 holds: nothing is rounded, and no subnormal flushed.
PK_INLINE static void store_exact(bf16* p, Pair v, bool uncached) {
  store_line(p, (Floats)((Words)v.a >> 16 | ((Words)v.b & 0xFFFF0000u)), uncached);
}

PK_INLINE static void store_rounded(bf16* p, Pair v, bool uncached) {
#if defined(__AVX512BF16__)
  // The first vector's numbers lie in the lower half; even and odd columns change places with halves.
  const __m512i order = _mm512_inserti64x4(_mm512_castsi256_si512(
      _mm256_setr_epi16(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)),
      _mm256_setr_epi16(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), 1);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
  store_line(p, (Floats)_mm512_permutexvar_epi16(order, halves), uncached);
#else
  store_line(p, (Floats)(bf16_bits(v.a) >> 16 | (bf16_bits(v.b) & 0xFFFF0000u)), uncached);
#endif
}

PK_INLINE static void store_rounded(f16* p, Pair v, [[maybe_unused]] bool uncached) {
#if defined(__AVX512F__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i a = _mm512_cvtps_ph((__m512)v.a, nearest), b = _mm512_cvtps_ph((__m512)v.b, nearest);
  store_line(p, (Floats)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1), uncached);
#elif defined(__F16C__)
  const __m128i a = _mm256_cvtps_ph((__m256)v.a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i b = _mm256_cvtps_ph((__m256)v.b, _MM_FROUND_TO_NEAREST_INT);
  store_line(p, (Floats)_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), uncached);
#else
  float wide[kSlot];
  store_pair(wide, v);
  convert(p, wide, kSlot);
#endif
}

PK_INLINE static void store_exact(float* p, Pair v, bool uncached) { store_rounded(p, v, uncached); }
PK_INLINE static void store_exact(f16* p, Pair v, bool uncached) { store_rounded(p, v, uncached); }

template <bool bits, class T>
PK_INLINE static void store_product(T* p, Pair v, bool uncached) {
  bits ? store_exact(p, v, uncached) : store_rounded(p, v, uncached);
}

// A product that no sum takes in before its rounding, as contraction would where dz is not needed: the sums are the same
// with dz and without.
PK_INLINE static Floats rounded_product(Floats a, Floats b) {
  Floats product = a * b;
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// ---- what an activation makes of a slot: the products, exact to fp32; `kept` is z or the bits of its columns ----

template <class T>
constexpr bool kShort = sizeof(T) == 2;

struct Relu {
  static constexpr bool bits = true;
  template <class T>
  PK_INLINE static Pair product(const T* dy, const uint8_t* kept) {
    uint32_t word = 0;
    memcpy(&word, kept, kSlot / 8);
    Words of_a, of_b;
    PK_UNROLL
    for (int64_t i = 0; i < kSlot; ++i) {
      const int64_t place = SlotOrder<T>::place(i);
      (place < kLanes ? of_a : of_b)[place % kLanes] = 1u << i;
    }
    const Pair g = load_pair(dy);
    return {((of_a & word) != 0) ? g.a : Floats{}, ((of_b & word) != 0) ? g.b : Floats{}};
  }
};

struct Gelu {
  static constexpr bool bits = false;
  template <class T>
  PK_INLINE static Pair product(const T* dy, const uint8_t* kept) {
    const Pair g = load_pair(dy), z = load_pair(reinterpret_cast<const T*>(kept));
    return {rounded_product(g.a, gelu_derivative<kShort<T>>(z.a)), rounded_product(g.b, gelu_derivative<kShort<T>>(z.b))};
  }
};

struct GeluTanh {
  static constexpr bool bits = false;
  template <class T>
  PK_INLINE static Pair product(const T* dy, const uint8_t* kept) {
    const Pair g = load_pair(dy), z = load_pair(reinterpret_cast<const T*>(kept));
    return {rounded_product(g.a, gelu_tanh_derivative(z.a)), rounded_product(g.b, gelu_tanh_derivative(z.b))};
  }
};

struct Silu {
  static constexpr bool bits = false;
  template <class T>
  PK_INLINE static Pair product(const T* dy, const uint8_t* kept) {
    const Pair g = load_pair(dy), z = load_pair(reinterpret_cast<const T*>(kept));
    return {rounded_product(g.a, silu_derivative(z.a)), rounded_product(g.b, silu_derivative(z.b))};
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
