// Sums over the threads that share a row, in fixed trees: the same bits in every thread, whatever runs first.
#pragma once

#include "device.cuh"

namespace peft_kernels {

// Sum of N terms, a power of two, log2(N) roundings deep; overwrites them.
template <int N>
__device__ __forceinline__ float sum_tree(float (&terms)[N]) {
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) terms[i] = __fadd_rn(terms[i], terms[i + half]);
  }
  return terms[0];
}

// Every lane's sum over the lanes of its group of `span`, a power of two up to 32. The whole warp calls it.
template <int N>
__device__ __forceinline__ void sum_warp(float (&values)[N], int span) {
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) {
    if (bits >= span) break;
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = __fadd_rn(values[i], __shfl_xor_sync(0xffffffffu, values[i], bits));
  }
}

template <int N>
struct WarpSums {
  float of[2][N][32];
};

// Sums over a team: `span` threads side by side, a power of two up to 32, or the whole block, of a multiple of 32
// threads. Every thread of the block calls it. `turn` alternates between two places for the warps' sums, so that one
// barrier is enough: a place is written again only after the other's barrier, which all who read it have reached.
template <int N>
__device__ __forceinline__ void sum_team(float (&values)[N], int span, int& turn) {
  sum_warp(values, span < 32 ? span : 32);
  if (span <= 32) return;
  WarpSums<N>& warps = shared<WarpSums<N>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) warps.of[turn][i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = lane < span / 32 ? warps.of[turn][i][lane] : 0.0f;
  sum_warp(values, 32);
  turn ^= 1;
}

}  // namespace peft_kernels
