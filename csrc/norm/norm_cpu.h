// Rows a vector of fp32 at a time, sums along a row, and how rows are shared out.
// Compiled once per instruction set.
#pragma once

#include "../common/column_sum_cpu.h"
#include "../common/output_memory.h"
#include "../common/results_cpu.h"
#include "../common/tasks_cpu.h"
#include "../common/vector_cpu.h"
#include "../common/workspace_cpu.h"
#include "norm.h"

namespace peft_kernels {
namespace PK_ISA {

// How many columns of a vector are there: all of them, known to the compiler, or the last few of a row.
struct All {};
struct Some {
  int64_t n;
};

template <class T>
static inline Float get(const T* p, All) {
  return widen(p);
}
template <class T>
static inline Float get(const T* p, Some some) {  // zeros past the end
  T part[kLanes] = {};
  memcpy(part, p, some.n * sizeof(T));
  return widen(part);
}

template <class T>
static inline Float set(T* p, Float v, All, Way way = Way::cached) {
  return put(p, v, way);
}
template <class T>
static inline Float set(T* p, Float v, Some some, Way = Way::cached) {
  T part[kLanes];
  const Float stored = put(part, v, Way::cached);
  memcpy(p, part, some.n * sizeof(T));
  return stored;
}

static inline Float live(Float v, All) { return v; }
static inline Float live(Float v, Some some) {  // zeros past the end
  float part[kLanes];
  store(part, v);
  for (int64_t i = some.n; i < kLanes; ++i) part[i] = 0;
  return load(part);
}

// step(k, All or Some) for every vector of a row of K columns.
template <class Step>
static inline void along(int64_t K, Step step) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) step(k, All{});
  if (k < K) step(k, Some{K - k});
}

// Vectors of fp32 added up in fp64, one half of the columns beside the other. By hand, as GCC 12 takes the lanes of a loop
// over them apart, one instruction for each.
struct Doubles {
  using Half = Vec<double>::type;
  Half low{}, high{};

  void add(Float v) {
#if defined(__AVX512F__)
    low += (Half)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    high += (Half)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    low += (Half)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    high += (Half)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
    for (int64_t i = 0; i < kLanes / 2; ++i) low[i] += v[i], high[i] += v[i + kLanes / 2];
#endif
  }

  double sum() const {
    const Half both = low + high;
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd((__m512d)both);
#else
    double lanes[kLanes / 2];
    store(lanes, both);
    PK_UNROLL
    for (int64_t half = kLanes / 4; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
  }
};

template <int sums>
struct Terms {
  Float of[sums];
};

// total[s] = the sum over a row of K columns of term(k, All or Some).of[s]. Error: chains of kRowChain terms in fp32 and a
// tree of kRowStreams, 9 roundings, then fp64.
constexpr int64_t kRowStreams = 4, kRowChain = 8;
template <int sums, class Term>
static inline void sum_along(int64_t K, double* total, Term term) {
  Doubles wide_sums[sums];
  const auto join = [&](const Terms<sums>& part) {
    PK_UNROLL
    for (int s = 0; s < sums; ++s) wide_sums[s].add(part.of[s]);
  };
  constexpr int64_t wide = kRowStreams * kLanes;
  int64_t k = 0;
  while (K - k >= wide) {
    const int64_t end = k + min64(kRowChain, (K - k) / wide) * wide;
    Terms<sums> part[kRowStreams];
    PK_UNROLL
    for (int i = 0; i < kRowStreams; ++i) part[i] = term(k + i * kLanes, All{});
    for (k += wide; k < end; k += wide) {
      PK_UNROLL
      for (int i = 0; i < kRowStreams; ++i) {
        const Terms<sums> next = term(k + i * kLanes, All{});
        PK_UNROLL
        for (int s = 0; s < sums; ++s) part[i].of[s] += next.of[s];
      }
    }
    PK_UNROLL
    for (int s = 0; s < sums; ++s) part[0].of[s] = (part[0].of[s] + part[1].of[s]) + (part[2].of[s] + part[3].of[s]);
    join(part[0]);
  }
  for (; k + kLanes <= K; k += kLanes) join(term(k, All{}));
  if (k < K) join(term(k, Some{K - k}));
  PK_UNROLL
  for (int s = 0; s < sums; ++s) total[s] = wide_sums[s].sum();
}

// Rows of a matrix as rows whose elements lie side by side: where they are, or gathered into `copies`; null without a matrix.
template <class T>
struct Lines {
  const T* first = nullptr;
  int64_t apart = 0;
  const T* operator[](int64_t r) const { return first + r * apart; }
};
template <class T>
static inline Lines<T> lines(const Strided& s, int64_t m, int64_t rows, int64_t K, T* copies) {
  if (!s.data) return {};
  const T* first = static_cast<const T*>(s.data) + m * s.row;
  if (s.col == 1 || K == 1) return {first, s.row};
  for (int64_t k = 0; k < K; ++k)
    for (int64_t r = 0; r < rows; ++r) copies[r * K + k] = first[r * s.row + k * s.col];
  return {copies, K};
}
static inline int64_t copied(const Strided& s, int64_t rows, int64_t K) {  // elements of `copies`
  return s.data && s.col != 1 && K > 1 ? rows * K : 0;
}

// Threads worth waking for M rows of K columns.
static inline int team_for(int threads, int64_t M, int64_t K) { return M * K < 32768 ? 1 : threads; }

void norm_forward(const NormFwd& f);

}  // namespace PK_ISA
}  // namespace peft_kernels
