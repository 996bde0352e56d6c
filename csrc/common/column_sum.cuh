// Column sums of M rows: a row pass with several loads in flight per thread, sums that stay exact to a few roundings for any
// M, and a tree over the threads of a block. Deterministic: the order of additions depends on sizes, strides, alignment
// and the number of blocks that the GPU runs at once.
//
// Error, with u = 2**-24 and S = sum|terms| of one column:
//  * A chain adds kBatch = 8 terms one after the other: at most 7 u S over all chains of the column (second-order terms
//    here and below are under u S for fewer than 2**40 rows).
//  * A chain's sum joins a TwoFloat by add(): of its three steps, the two two_sum are exact (Knuth), and v = lo + e is one
//    rounding, u |lo + e|. Between additions |lo| <= u |hi| (what two_sum leaves over), |e| <= u |hi + y|, and both hi
//    are at most S (1 + 8 u): at most 2 u**2 S per addition. A thread makes at most kMostRows / 8 = 2**24: 2 u S.
//  * The tree merges with two such roundings of lo instead of one, eight merges deep: under u**2 32 S.
//  * hi = fl(hi + lo): 1 u S.
// So a block's sum is within 10 u S (3 u S with chains of one), and that of the blocks' sums, again by this pass with
// chains of one and far fewer rows, within 1 u S of their sum: 11 u S in all, below the 16 u that the tests allow.
// An output of 16 bits adds its own rounding.
//
// Infinity: e and the new lo are NaN where hi overflowed or was infinite; add() counts such a v as 0, so that hi is what
// a plain sum gives: +inf with finite terms stays +inf, +inf with -inf is NaN.
#pragma once

#include "vec.cuh"

namespace peft_kernels {

// hi + lo, lo the part that hi could not hold. The intrinsics keep the compiler from contracting and reordering.
struct TwoFloat {
  float hi, lo;
};

// hi + lo == a + b exactly, in any order of their magnitudes.
__device__ __forceinline__ TwoFloat two_sum(float a, float b) {
  const float sum = __fadd_rn(a, b);
  const float b_part = __fsub_rn(sum, a);
  const float a_part = __fsub_rn(sum, b_part);
  return {sum, __fadd_rn(__fsub_rn(a, a_part), __fsub_rn(b, b_part))};
}

__device__ __forceinline__ TwoFloat renormalized(float hi, float v) {
  return two_sum(hi, fabsf(v) <= FLT_MAX ? v : 0.0f);
}

__device__ __forceinline__ void add(TwoFloat& sum, float y) {
  const TwoFloat s = two_sum(sum.hi, y);
  sum = renormalized(s.hi, __fadd_rn(sum.lo, s.lo));
}

__device__ __forceinline__ void add(TwoFloat& sum, TwoFloat y) {
  const TwoFloat s = two_sum(sum.hi, y.hi);
  sum = renormalized(s.hi, __fadd_rn(__fadd_rn(sum.lo, y.lo), s.lo));
}

constexpr int kBatch = 8;                   // rows that a thread adds up before the next
constexpr long long kMostRows = 1ll << 27;  // that one thread may sum
constexpr int kSumThreads = 256;

// The rows of a batch that lie below end; Full: all of them do. Chain, a divisor of kBatch: terms that are added before
// their sum joins `sum`.
template <int Chain, bool Full, typename Rows>
__device__ __forceinline__ void sum_batch(const Rows& rows, long long row, long long end, long long step,
                                          long long column, TwoFloat (&sum)[Rows::kColumns]) {
  static_assert(kBatch % Rows::kInFlight == 0, "a batch is loaded in equal parts");
  float chain[Rows::kColumns];
#pragma unroll 1  // or the loads of all parts are hoisted, and registers run out
  for (int part = 0; part < kBatch; part += Rows::kInFlight) {
    typename Rows::Raw raw[Rows::kInFlight];
#pragma unroll
    for (int i = 0; i < Rows::kInFlight; ++i)
      if (Full || row + (part + i) * step < end) raw[i] = rows.load(row + (part + i) * step, column);
#pragma unroll
    for (int i = 0; i < Rows::kInFlight; ++i) {
      const int at = part + i;
      float values[Rows::kColumns] = {};
      if (Full || row + at * step < end) rows.values(raw[i], row + at * step, column, values);
#pragma unroll
      for (int c = 0; c < Rows::kColumns; ++c) {
        chain[c] = at % Chain == 0 ? values[c] : __fadd_rn(chain[c], values[c]);
        if (at % Chain == Chain - 1) add(sum[c], chain[c]);
      }
    }
  }
}

// Rows first, first + step, ... below end of the columns from `column` on, added to `sum`.
template <int Chain, typename Rows>
__device__ __forceinline__ void sum_rows(const Rows& rows, long long first, long long end, long long step,
                                         long long column, TwoFloat (&sum)[Rows::kColumns]) {
  long long row = first;
  for (; row + (kBatch - 1) * step < end; row += kBatch * step)
    sum_batch<Chain, true>(rows, row, end, step, column, sum);
  if (row < end) sum_batch<Chain, false>(rows, row, end, step, column, sum);
}

template <int Columns>
struct BlockSums {
  float hi[Columns][kSumThreads], lo[Columns][kSumThreads];
};

// Sums over the threads of a block that hold the same columns, those `lanes` apart (a power of two); in the first
// `lanes` threads after it. Every thread of the block calls it.
template <int Columns>
__device__ __forceinline__ void sum_block(TwoFloat (&sum)[Columns], int lanes) {
  BlockSums<Columns>& scratch = shared<BlockSums<Columns>>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = kSumThreads / 2; half >= lanes; half /= 2) {
    if (thread >= half && thread < 2 * half) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) scratch.hi[c][thread] = sum[c].hi, scratch.lo[c][thread] = sum[c].lo;
    }
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) add(sum[c], TwoFloat{scratch.hi[c][thread + half], scratch.lo[c][thread + half]});
    }
  }
}

// How rows and columns lie on a grid: blockIdx.x a tile of lanes * kColumns columns, blockIdx.y a part of the rows.
struct ColumnSum {
  long long M, N;
  long long rows_per_part;
  int lanes;  // threads side by side along a row; the other kSumThreads / lanes rows of threads share a part's rows
};

// out [parts, N]: the sum of each part of the rows.
template <int Chain, typename Rows, typename Out>
__device__ __forceinline__ void column_sum(const Rows& rows, Out* out, const ColumnSum& shape) {
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes, row = static_cast<int>(threadIdx.x) / shape.lanes;
  const long long column = (static_cast<long long>(blockIdx.x) * shape.lanes + lane) * Rows::kColumns;
  const long long begin = blockIdx.y * shape.rows_per_part;
  const long long end = begin + shape.rows_per_part < shape.M ? begin + shape.rows_per_part : shape.M;
  TwoFloat sum[Rows::kColumns] = {};
  if (column < shape.N) sum_rows<Chain>(rows, begin + row, end, kSumThreads / shape.lanes, column, sum);
  sum_block(sum, shape.lanes);
  if (row > 0 || column >= shape.N) return;
#pragma unroll
  for (int c = 0; c < Rows::kColumns; ++c) from_float(sum[c].hi, out[blockIdx.y * shape.N + column + c]);
}

}  // namespace peft_kernels
