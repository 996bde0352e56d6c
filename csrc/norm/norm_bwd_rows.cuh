// The backward pass over rows: dx, and each block's sums for dweight and dbias, from one read of dy and x.
//
// A team goes through the rows of its block's part, kRows at a time: two sums over each row, dx, and the terms dy *
// xhat and dy of each of a thread's own columns added to a chain. Where the registers allow it, the next rows are on
// their way while these are reduced. Chains of kChain rows join TwoFloats, which every thread keeps in its own words of
// shared memory: there they cost one access in kChain rows, and leave the registers to the rows.
//
// Error of a column's sum: csrc/common/column_sum.cuh's, whose chains, TwoFloats and tree these are: 11 u S with
// u = 2**-24, S = sum|terms|, below the 16 u that the tests allow, on terms dy * xhat that are one rounding each.
#pragma once

#include "norm_cuda.h"
#include "norm_rows.cuh"

namespace peft_kernels {

constexpr int kThreadsPerSm = 512;  // which leaves each 128 registers
constexpr int kChain = kBatch;      // rows whose terms are added before they join a TwoFloat

constexpr int kMostCarriedPieces = 2;  // per thread, beside whose chains the registers hold a row

// The compiler takes what lies there for unknown after it. Else it keeps the floats that it made of 16-bit numbers
// until their next use, in twice the registers.
__device__ __forceinline__ void forget(uint4& bits) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
#else
  static_cast<void>(bits);
#endif
}

// How a launch goes over rows and columns: blockIdx.x a part of the rows, blockIdx.y a tile of span * V pieces.
struct RowParts {
  long long rows_per_part;
  int span;
  float per_column;  // 1 / K
};

// T: x's dtype, Dy: dy's. V: pieces of a row that a thread holds. Dx, Dw, Db: what is needed.
template <typename T_, typename Dy_, int V_, bool Dx_, bool Dw_, bool Db_>
struct Pass {
  using T = T_;
  using Dy = Dy_;
  static constexpr int V = V_, W = kWide<T>, kSums = Dw_ + Db_;
  static constexpr bool Dx = Dx_, Dw = Dw_, Db = Db_, kReadsX = Dx || Dw;
  static constexpr int kDyLoads = W * static_cast<int>(sizeof(Dy)) / 16;
  static constexpr int kRows = !Dx ? 4 : V == 1 && kDyLoads == 1 ? 2 : 1;
  static constexpr int kCarried = V * W * kSums, kSharedPerThread = kCarried * static_cast<int>(sizeof(TwoFloat));
  static constexpr int kHeld = kRows * V * 4 * (kDyLoads + kReadsX);
  static constexpr bool kAhead = Dx && kSums > 0 && kCarried + 2 * kHeld <= 56;
  static constexpr int kRegisters = kCarried + (kAhead ? 2 : 1) * kHeld;
  // What there may be no room for besides: dtotal's loads at the start of a row.
  static constexpr bool kTotalEarly = kSums > 0 ? kRegisters + 4 * V * kRows <= 64 : kDyLoads == 1;
  static constexpr bool kKeepsWeight = V == 1;
  static constexpr int kThreads = Dx ? kMostThreads : kSumThreads, kBlocksPerSm = kThreadsPerSm / kThreads;
};

template <typename P>
struct HeldRow {
  uint4 dy[P::V][P::kDyLoads], x[P::V], dtotal[P::V];
  float mean, rstd;
};

// What a thread knows of its place.
struct Place {
  int lane, span;
  long long piece, pieces, end;  // of lane's first piece in a row, of a row, of the part's rows

  __device__ __forceinline__ bool has(long long row, int v) const { return row < end && piece + v * span < pieces; }
};

// Every load of dy and x of a row that there is, zeros for the rest.
template <typename P>
__device__ __forceinline__ void load_row(const NormBackward& a, const Place& at, long long row, HeldRow<P>& held) {
#pragma unroll
  for (int v = 0; v < P::V; ++v) {
    const long long piece = at.piece + v * at.span;
    const bool has = at.has(row, v);
#pragma unroll
    for (int i = 0; i < P::kDyLoads; ++i)
      held.dy[v][i] = has ? load_piece<typename P::Dy>(a.dy, row * a.dy_row_stride, piece * P::kDyLoads + i) : uint4{};
    if constexpr (P::kReadsX) held.x[v] = has ? load_piece<typename P::T>(a.x, row * a.x_row_stride, piece) : uint4{};
  }
  held.mean = 0.0f, held.rstd = 0.0f;
  if constexpr (P::kReadsX) {
    if (row >= at.end) return;
    held.rstd = __ldg(a.rstd + row);
    if (!a.rms) held.mean = __ldg(a.mean + row);
  }
}

template <typename P>
__device__ __forceinline__ void load_dtotal(const NormBackward& a, const Place& at, long long row, HeldRow<P>& held) {
#pragma unroll
  for (int v = 0; v < P::V; ++v)
    held.dtotal[v] = a.dtotal != nullptr && at.has(row, v)
                         ? load_piece<typename P::T>(a.dtotal, row * a.dtotal_row_stride, at.piece + v * at.span)
                         : uint4{};
}

template <typename P>
__device__ __forceinline__ void dy_of(const HeldRow<P>& held, int v, float (&out)[P::W]) {
  constexpr int kPerLoad = P::W / P::kDyLoads;
#pragma unroll
  for (int i = 0; i < P::kDyLoads; ++i) {
    float values[kPerLoad];
    unpack<typename P::Dy>(held.dy[v][i], values);
#pragma unroll
    for (int c = 0; c < kPerLoad; ++c) out[i * kPerLoad + c] = values[c];
  }
}

template <typename P>
__device__ __forceinline__ void xhat_of(const HeldRow<P>& held, int v, float (&out)[P::W]) {
  unpack<typename P::T>(held.x[v], out);
#pragma unroll
  for (int c = 0; c < P::W; ++c) out[c] = (out[c] - held.mean) * held.rstd;
}

template <typename P>
__device__ __forceinline__ void forget(HeldRow<P>& held) {
#pragma unroll
  for (int v = 0; v < P::V; ++v) {
#pragma unroll
    for (int i = 0; i < P::kDyLoads; ++i) forget(held.dy[v][i]);
    if constexpr (P::kReadsX) forget(held.x[v]);
  }
}

// What a thread keeps from row to row.
template <typename P>
struct Carried {
  float chain[P::kSums > 0 ? P::kSums : 1][P::V][P::W];  // dweight's first
  float weight[P::W];                                    // where kKeepsWeight
};

// Four of the thread's TwoFloats in shared memory: their hi, or their lo. Neighbours' lie side by side.
template <typename P>
__device__ __forceinline__ uint4& shared_words(int sum, int v, int column, bool low) {
  const int which = ((sum * P::V + v) * (P::W / 4) + column / 4) * 2 + low;
  return reinterpret_cast<uint4*>(dynamic_shared())[which * static_cast<int>(blockDim.x) + threadIdx.x];
}

template <typename P>
__device__ __forceinline__ void clear_shared() {
  for (int i = 0; i < P::kSharedPerThread / 16; ++i)
    reinterpret_cast<uint4*>(dynamic_shared())[i * static_cast<int>(blockDim.x) + threadIdx.x] = uint4{};
}

template <typename P>
__device__ __forceinline__ void load_shared(int sum, int v, int column, TwoFloat (&out)[4]) {
  float hi[4], lo[4];
  unpack<float>(shared_words<P>(sum, v, column, false), hi);
  unpack<float>(shared_words<P>(sum, v, column, true), lo);
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] = {hi[c], lo[c]};
}

// The chains join the TwoFloats and begin anew.
template <typename P>
__device__ __forceinline__ void fold(Carried<P>& carried) {
#pragma unroll
  for (int i = 0; i < P::kSums * P::V * P::W; i += 4) {
    const int sum = i / (P::V * P::W), v = i / P::W % P::V, column = i % P::W;
    TwoFloat all[4];
    float hi[4], lo[4];
    load_shared<P>(sum, v, column, all);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      add(all[c], carried.chain[sum][v][column + c]);
      hi[c] = all[c].hi, lo[c] = all[c].lo;
      carried.chain[sum][v][column + c] = 0.0f;
    }
    shared_words<P>(sum, v, column, false) = pack<float>(hi);
    shared_words<P>(sum, v, column, true) = pack<float>(lo);
  }
}

template <typename P>
__device__ __forceinline__ void weight_of(const NormBackward& a, const Place& at, const Carried<P>& carried, int v,
                                          float (&out)[P::W]) {
#pragma unroll
  for (int c = 0; c < P::W; ++c) out[c] = P::kKeepsWeight ? carried.weight[c] : 1.0f;
  if constexpr (!P::kKeepsWeight) {
    const long long piece = at.piece + v * at.span;
    if (piece < at.pieces) load_parameter(a.weight, a.weight_dtype, piece * P::W, 1.0f, out);
  }
}

// This thread's part of sum(g) and sum(g * xhat) over a row.
template <typename P>
__device__ __forceinline__ void row_terms(const NormBackward& a, const Place& at, const Carried<P>& carried,
                                          const HeldRow<P>& held, float (&sums)[2]) {
  float of_g[P::V], of_both[P::V];
#pragma unroll
  for (int v = 0; v < P::V; ++v) {
    float g[P::W], xhat[P::W], weight[P::W];
    weight_of(a, at, carried, v, weight);
    dy_of(held, v, g);
    xhat_of(held, v, xhat);
#pragma unroll
    for (int c = 0; c < P::W; ++c) g[c] *= weight[c], xhat[c] *= g[c];
    of_g[v] = sum_tree(g), of_both[v] = sum_tree(xhat);
  }
  sums[0] = sum_tree(of_g), sums[1] = sum_tree(of_both);
}

// dx of a row, from the means of g (0 for RMSNorm) and of g * xhat.
template <typename P>
__device__ __forceinline__ void write_dx(const NormBackward& a, const Place& at, const Carried<P>& carried,
                                         long long row, const HeldRow<P>& held, float mean_g, float mean_both) {
#pragma unroll
  for (int v = 0; v < P::V; ++v) {
    if (!at.has(row, v)) continue;
    float g[P::W], xhat[P::W], weight[P::W], dtotal[P::W];
    weight_of(a, at, carried, v, weight);
    dy_of(held, v, g);
    xhat_of(held, v, xhat);
    unpack<typename P::T>(held.dtotal[v], dtotal);
#pragma unroll
    for (int c = 0; c < P::W; ++c)
      g[c] = held.rstd * (g[c] * weight[c] - mean_g - xhat[c] * mean_both) + dtotal[c];
    store_columns(static_cast<typename P::T*>(a.dx) + row * a.K + (at.piece + v * at.span) * P::W, g);
  }
}

// Terms of a row join the chains.
template <typename P>
__device__ __forceinline__ void add_terms(const HeldRow<P>& held, Carried<P>& carried) {
#pragma unroll
  for (int v = 0; v < P::V; ++v) {
    float dy[P::W], xhat[P::W];
    dy_of(held, v, dy);
    if constexpr (P::Dw) xhat_of(held, v, xhat);
#pragma unroll
    for (int c = 0; c < P::W; ++c) {
      if constexpr (P::Dw) carried.chain[0][v][c] = __fadd_rn(carried.chain[0][v][c], __fmul_rn(dy[c], xhat[c]));
      if constexpr (P::Db) carried.chain[P::Dw][v][c] = __fadd_rn(carried.chain[P::Dw][v][c], dy[c]);
    }
  }
}

// A block's sums, to the workspace's row of that part: [parts, kSums, K].
template <typename P>
__device__ __forceinline__ void write_part(const NormBackward& a, const Place& at) {
  float* const out = a.workspace + static_cast<long long>(blockIdx.x) * P::kSums * a.K;
#pragma unroll
  for (int i = 0; i < P::kSums * P::V; ++i) {
    const int sum = i / P::V, v = i % P::V;
    TwoFloat all[P::W];
#pragma unroll
    for (int column = 0; column < P::W; column += 4) {
      TwoFloat four[4];
      load_shared<P>(sum, v, column, four);
#pragma unroll
      for (int c = 0; c < 4; ++c) all[column + c] = four[c];
    }
    if constexpr (P::V == 1) {
      if (at.span <= 32) sum_block(all, at.span);
    }
    const long long piece = at.piece + v * at.span;
    if (static_cast<int>(threadIdx.x) >= at.span || piece >= at.pieces) continue;
    float values[P::W];
#pragma unroll
    for (int c = 0; c < P::W; ++c) values[c] = all[c].hi;
    store_columns(out + sum * a.K + piece * P::W, values);
  }
}

template <typename P>
__global__ void __launch_bounds__(P::kThreads, P::kBlocksPerSm)
    norm_bwd_rows_kernel(const NormBackward a, const RowParts parts) {
  const int span = parts.span, teams = static_cast<int>(blockDim.x) / span;
  const long long begin = blockIdx.x * parts.rows_per_part, step = static_cast<long long>(teams) * P::kRows;
  Place at;
  at.lane = static_cast<int>(threadIdx.x) % span, at.span = span;
  at.piece = static_cast<long long>(blockIdx.y) * span * P::V + at.lane, at.pieces = a.K / P::W;
  at.end = begin + parts.rows_per_part < a.M ? begin + parts.rows_per_part : a.M;
  Carried<P> carried = {};
  if constexpr (P::Dx && P::kKeepsWeight) {
    if (at.piece < at.pieces) load_parameter(a.weight, a.weight_dtype, at.piece * P::W, 1.0f, carried.weight);
  }
  HeldRow<P> next[P::kRows];
  const auto load_rows = [&](long long first) {
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) load_row(a, at, first + r, next[r]);
  };
  // All teams of a block go through as many steps, as they meet at barriers and shuffles.
  const long long own = begin + static_cast<long long>(threadIdx.x / span) * P::kRows;
  int turn = 0, chained = 0;
  clear_shared<P>();
  if constexpr (P::kAhead) load_rows(own);
  for (long long from = begin; from < at.end; from += step) {
    const long long row = own + (from - begin);
    if constexpr (!P::kAhead) load_rows(row);
    HeldRow<P> held[P::kRows];
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) held[r] = next[r];
    if constexpr (P::kAhead) load_rows(row + step);
    if constexpr (P::Dx) {
      float sums[2 * P::kRows];
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        float own_sums[2];
        if constexpr (P::kTotalEarly) load_dtotal(a, at, row + r, held[r]);
        row_terms(a, at, carried, held[r], own_sums);
        sums[2 * r] = own_sums[0], sums[2 * r + 1] = own_sums[1];
      }
      sum_team(sums, span, turn);
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        forget(held[r]);
        if constexpr (!P::kTotalEarly) load_dtotal(a, at, row + r, held[r]);
        write_dx(a, at, carried, row + r, held[r], a.rms ? 0.0f : sums[2 * r] * parts.per_column,
                 sums[2 * r + 1] * parts.per_column);
      }
    }
    if constexpr (P::kSums > 0) {
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) add_terms(held[r], carried);
      chained += P::kRows;
      if (chained == kChain) fold(carried), chained = 0;
    }
  }
  if constexpr (P::kSums > 0) {
    fold(carried);
    write_part<P>(a, at);
  }
}

}  // namespace peft_kernels
