// The forward of ReLU: y, and one bit for each element that passes. Compiled once per instruction set.
#pragma once

#include "../common/blocks_cpu.h"
#include "../common/output_memory.h"
#include "act.h"
#include "act_slots_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

template <int bytes>
struct Signed {
  using type = int32_t;
};
template <>
struct Signed<2> {
  using type = int16_t;
};
template <class T>
constexpr int kInfinity = -(1 << 23);  // the bits of -inf as a signed number
template <>
constexpr int kInfinity<bf16> = -(1 << 7);
template <>
constexpr int kInfinity<f16> = -(1 << 10);

// One bit for each lane of a mask of all ones or zeros.
template <class S>
static inline uint32_t lane_bits(typename Vec<S>::type mask) {
#if defined(__AVX512BW__)
  return sizeof(S) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi16_mask((__m512i)mask);
#elif defined(__AVX2__)
  if (sizeof(S) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  const __m256i bytes = (__m256i)mask;
  return static_cast<uint32_t>(
      _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1))));
#else
  uint32_t bits = 0;
  PK_UNROLL
  for (int i = 0; i < Vec<S>::lanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// One slot: y, and its kSlot / 8 bytes of bits.
template <class T>
static inline void relu_slot(const T* z, T* y, uint8_t* mask, bool uncached) {
  using S = typename Signed<sizeof(T)>::type;
  constexpr int lanes = Vec<S>::lanes;
  uint32_t bits = 0;
  PK_UNROLL
  for (int i = 0; i < kSlot; i += lanes) {
    const typename Vec<S>::type v = load(reinterpret_cast<const S*>(z + i));
    // Signed numbers above -inf's: positive ones, both zeros but -0, NaNs of either sign.
    const typename Vec<S>::type passes = (v > static_cast<S>(kInfinity<T>)) & (v != 0);
    store_line(y + i, (Floats)(v & passes), uncached);
    bits |= lane_bits<S>(passes) << i;
  }
  memcpy(mask, &bits, kSlot / 8);
}

template <class T>
static void relu_part(const T* z, int64_t apart, T* y, uint8_t* mask, int64_t columns, bool uncached) {
  int64_t n = 0;
  if (apart == 1)
    for (; n + kSlot <= columns; n += kSlot) relu_slot(z + n, y + n, mask + n / 8, uncached);
  for (; n < columns; n += kSlot) {
    const int64_t live = min64(kSlot, columns - n);
    T in[kSlot] = {}, out[kSlot];
    uint8_t bits[kSlot / 8];
    gather(in, z + n * apart, apart, live);
    relu_slot(in, out, bits, false);
    memcpy(y + n, out, live * sizeof(T));
    memcpy(mask + n / 8, bits, ceil_div(live, 8));
  }
}

template <class T>
void run_relu(const ReluFwd& f) {
  constexpr int64_t run = 1 << 16;  // elements of a task, about
  const bool unit = f.col == 1 || f.N == 1, whole = unit && f.N % 8 == 0 && (f.row == f.N || f.M == 1);
  const int64_t M = whole ? 1 : f.M, N = whole ? f.M * f.N : f.N, mask_row = ceil_div(N, 8);
  const int64_t rows = N < run ? run / N : 1, blocks = ceil_div(M, rows), parts = ceil_div(N, run);
  const bool uncached = goes_past_cache(f.y, M, N * static_cast<int64_t>(sizeof(T)));
  const T* z = static_cast<const T*>(f.z);
  T* y = static_cast<T*>(f.y);
#pragma omp parallel num_threads(static_cast<int>(min64(f.threads, blocks * parts)))
  {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < blocks * parts; ++task) {
      const int64_t n = task % parts * run, first = task / parts * rows;
      for (int64_t m = first; m < min64(first + rows, M); ++m)
        relu_part(z + m * f.row + n * f.col, unit ? 1 : f.col, y + m * N + n, f.mask + m * mask_row + n / 8,
                  min64(run, N - n), uncached);
    }
    if (uncached) finish_stores();
  }
}

void run_relu_f64(const ReluFwd& f) {
  const double* z = static_cast<const double*>(f.z);
  double* y = static_cast<double*>(f.y);
#pragma omp parallel for schedule(static) num_threads(f.threads)
  for (int64_t m = 0; m < f.M; ++m) {
    uint8_t* mask = f.mask + m * ceil_div(f.N, 8);
    memset(mask, 0, ceil_div(f.N, 8));
    for (int64_t n = 0; n < f.N; ++n) {
      const double v = z[m * f.row + n * f.col];
      const bool passes = !(v <= 0);
      y[m * f.N + n] = passes ? v : 0;
      mask[n / 8] |= static_cast<uint8_t>(passes << (n % 8));
    }
  }
}

}  // namespace
}  // namespace PK_ISA
}  // namespace peft_kernels
