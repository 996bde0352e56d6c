// The innermost loops of a product: tiles of sums in registers. Compiled once per instruction set.
#pragma once

#include "simd_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

// Arithmetic of the micro-kernel: `Step` elements of P are broadcast, `Step` elements of Q are vector lanes, and one step
// covers `pair` terms of the reduction.
template <class T>
struct Fma {
  using Acc = T;
  using Step = T;
  using Elem = T;
  static constexpr int pair = 1;
  static inline typename Vec<Acc>::type madd(Step p, typename Vec<Step>::type q, typename Vec<Acc>::type acc) {
    return acc + p * q;
  }
};

#if defined(__AVX512BF16__)
// Two neighbouring bf16 terms per 32-bit step.
struct Dot2 {
  using Acc = float;
  using Step = uint32_t;
  using Elem = bf16;
  static constexpr int pair = 2;
  static inline Vec<float>::type madd(uint32_t p, Vec<uint32_t>::type q, Vec<float>::type acc) {
    return (Vec<float>::type)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(p)), (__m512bh)q);
  }
};
#endif

// c[i, j] (+)= sum_k p[i, k] * q[k, j] for H rows and NV vectors, held in registers over all steps.
// PI is the distance between rows of p if it is known at compile time, else 0 and `pi` is used; likewise PK along k.
template <class Math, int H, int NV, int PI, int PK>
static inline void tile(int64_t steps, const typename Math::Step* p, int64_t pi, int64_t pk, const typename Math::Step* q,
                        int64_t qk, typename Math::Acc* c, int64_t ldc, bool first) {
  using Acc = typename Math::Acc;
  using Step = typename Math::Step;
  constexpr int W = Vec<Acc>::lanes;
  const int64_t di = PI ? PI : pi, dk = PK ? PK : pk;
  typename Vec<Acc>::type acc[H][NV];
  PK_UNROLL
  for (int i = 0; i < H; ++i) {
    PK_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = typename Vec<Acc>::type{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    typename Vec<Step>::type row[NV];
    PK_UNROLL
    for (int j = 0; j < NV; ++j) row[j] = load(q + k * qk + j * W);
    PK_UNROLL
    for (int i = 0; i < H; ++i) {
      const Step a = p[i * di + k * dk];
      PK_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = Math::madd(a, row[j], acc[i][j]);
    }
  }
  PK_UNROLL
  for (int i = 0; i < H; ++i) {
    PK_UNROLL
    for (int j = 0; j < NV; ++j) {
      Acc* out = c + i * ldc + j * W;
      store(out, first ? acc[i][j] : load(out) + acc[i][j]);
    }
  }
}

// The same for any number of rows: full tiles of H rows, then of H / 2, and so on.
template <class Math, int H, int NV, int PI, int PK>
static inline void tiles(int64_t rows, int64_t steps, const typename Math::Step* p, int64_t pi, int64_t pk,
                         const typename Math::Step* q, int64_t qk, typename Math::Acc* c, int64_t ldc, bool first) {
  const int64_t di = PI ? PI : pi;
  for (; rows >= H; rows -= H, p += H * di, c += H * ldc) tile<Math, H, NV, PI, PK>(steps, p, pi, pk, q, qk, c, ldc, first);
  if constexpr (H > 1) {
    if (rows > 0) tiles<Math, H / 2, NV, PI, PK>(rows, steps, p, pi, pk, q, qk, c, ldc, first);
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
