// Sums of columns in fp32 and fp64, for any kernel that meets the rows of a gradient. Compiled once per instruction set.
//
// Error, for terms t of one column: kStreams rows are added as a tree (2 roundings), up to kChain of those in a chain in fp32
// (kChain - 1 more, as the first is stored), and what comes out is added in fp64: 12 u(fp32) sum|t|, and 2^-53 sum|t| for each
// addition in fp64. A caller that cuts the rows into blocks and keeps their sums in fp32 pays one more u, one that rounds the
// result to fp32 on its way to 16 bits another. Of 32 blocks each makes M / 1408 additions: 1.5 u at M = 2^40, 16 in all.
// Nothing is compensated, so nothing turns an infinity into a NaN and no compiler flag can take the accuracy away.
#pragma once

#include "blocks_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kStreams = 4;  // rows read at a time, each stream running on through its own rows: the prefetcher's pattern
constexpr int64_t kChain = 11;   // sums in a chain of fp32 before it moves to fp64
constexpr int64_t kLanes = Vec<float>::lanes;
constexpr int64_t kSlot = 2 * kLanes;  // columns that are summed together: two vectors
constexpr int64_t kAhead = 1024;       // bytes prefetched ahead, past what the hardware does

// kSlot columns as two vectors. bf16 splits into even and odd columns: one shift and one mask.
struct Pair {
  Vec<float>::type a, b;
};

static inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
static inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
static inline void store_pair(float* p, Pair v) { store(p, v.a), store(p + kLanes, v.b); }

static inline Pair load_pair(const bf16* p) {
  const Vec<uint32_t>::type two = load(reinterpret_cast<const uint32_t*>(p));
  return {(Vec<float>::type)(two << 16), (Vec<float>::type)(two & 0xFFFF0000u)};
}

static inline Pair load_pair(const f16* p) {
#if defined(__AVX512F__)
  const __m256i *low = reinterpret_cast<const __m256i*>(p), *high = low + 1;
  return {(Vec<float>::type)_mm512_cvtph_ps(_mm256_loadu_si256(low)),
          (Vec<float>::type)_mm512_cvtph_ps(_mm256_loadu_si256(high))};
#elif defined(__F16C__)
  const __m128i *low = reinterpret_cast<const __m128i*>(p), *high = low + 1;
  return {(Vec<float>::type)_mm256_cvtph_ps(_mm_loadu_si128(low)), (Vec<float>::type)_mm256_cvtph_ps(_mm_loadu_si128(high))};
#else
  float wide[kSlot];
  convert(wide, p, kSlot);
  return load_pair(wide);
#endif
}

template <class T>
struct SlotOrder {
  static constexpr int64_t place(int64_t column) { return column; }
};
template <>
struct SlotOrder<bf16> {
  static constexpr int64_t place(int64_t column) { return column % 2 * kLanes + column / 2; }
};

static inline float widen(float v) { return v; }
static inline float widen(bf16 v) { return to_float(v); }
static inline float widen(f16 v) { return to_float(v); }

// Columns [0, cols), cols >= kSlot, as slots: the last one ends at the last column and may begin inside the one before it.
struct Slots {
  int64_t cols;
  int64_t count() const { return ceil_div(cols, kSlot); }
  int64_t size() const { return count() * kSlot; }
  int64_t begin(int64_t slot) const { return min64(slot * kSlot, cols - kSlot); }
};

template <class T, int streams>
static inline Pair add_streams(const T* p, int64_t apart) {
  if constexpr (streams == 1) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
    if constexpr (kSlot * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + 64);
    return load_pair(p);
  } else {
    return add_streams<T, streams / 2>(p, apart) + add_streams<T, streams / 2>(p + apart * (streams / 2), apart);
  }
}

// chain (+)= one row of each stream.
template <class T, int streams>
static inline void add_row(const T* p, int64_t apart, Slots slots, float* chain, bool first) {
  const int64_t full = slots.cols / kSlot;
  float* sums = chain;
  if (first)
    for (int64_t s = 0; s < full; ++s, sums += kSlot) store_pair(sums, add_streams<T, streams>(p + s * kSlot, apart));
  else
    for (int64_t s = 0; s < full; ++s, sums += kSlot)
      store_pair(sums, load_pair(sums) + add_streams<T, streams>(p + s * kSlot, apart));
  if (full == slots.count()) return;
  const Pair row = add_streams<T, streams>(p + slots.begin(full), apart);
  store_pair(sums, first ? row : load_pair(sums) + row);
}

static inline void fold(const float* chain, int64_t size, double* total, bool first) {
  if (first)
    for (int64_t i = 0; i < size; ++i) total[i] = chain[i];
  else
    for (int64_t i = 0; i < size; ++i) total[i] += chain[i];
}

// total = the sums of rows >= 1 rows of p, in slots; chain is scratch of the same size.
template <class T>
static void sum_rows(const T* p, int64_t ld, int64_t rows, Slots slots, float* __restrict chain, double* __restrict total) {
  const int64_t steps = rows / kStreams, size = slots.size();
  for (int64_t begin = 0; begin < steps; begin += kChain) {
    for (int64_t step = begin; step < min64(begin + kChain, steps); ++step)
      add_row<T, kStreams>(p + step * ld, steps * ld, slots, chain, step == begin);
    fold(chain, size, total, begin == 0);
  }
  const int64_t rest = steps * kStreams;
  for (int64_t row = rest; row < rows; ++row) add_row<T, 1>(p + row * ld, 0, slots, chain, row == rest);
  if (rest < rows) fold(chain, size, total, rest == 0);
}

// total [cols] = the sums of rows >= 0 rows at any strides.
template <class T>
static void sum_strided(const T* p, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, double* total) {
  for (int64_t n = 0; n < cols; ++n) total[n] = 0;
  for (int64_t m = 0; m < rows; m += kChain)
    for (int64_t n = 0; n < cols; ++n) {
      const T* column = p + m * row_stride + n * col_stride;
      const int64_t live = min64(kChain, rows - m);
      float sum = widen(column[0]);
      for (int64_t i = 1; i < live; ++i) sum += widen(column[i * row_stride]);
      total[n] += sum;
    }
}

// The sum of n >= 0 elements that lie side by side.
template <class T>
static double sum_line(const T* p, int64_t n) {
  constexpr int64_t wide = kStreams * kSlot, run = wide * kChain;
  double lanes[kSlot] = {}, rest = 0;
  int64_t at = 0;
  while (n - at >= wide) {
    const int64_t steps = min64(run, n - at) / wide;
    Pair part[kStreams];
    for (int64_t s = 0; s < kStreams; ++s) part[s] = load_pair(p + at + s * kSlot);
    for (int64_t step = 1; step < steps; ++step)
      for (int64_t s = 0; s < kStreams; ++s) part[s] = part[s] + load_pair(p + at + step * wide + s * kSlot);
    static_assert(kStreams == 4, "the tree below");
    float sums[kSlot];
    store_pair(sums, (part[0] + part[1]) + (part[2] + part[3]));
    for (int64_t i = 0; i < kSlot; ++i) lanes[i] += sums[i];
    at += steps * wide;
  }
  for (; at < n; ++at) rest += widen(p[at]);
  for (int64_t i = 0; i < kSlot; ++i) rest += lanes[i];
  return rest;
}

}  // namespace PK_ISA
}  // namespace peft_kernels
