// Host side of column sums: how rows and columns lie on a grid, and the launches. Blocks write fp32 sums of their part of
// the rows, and a small second launch sums the parts; one part needs no second launch.
#pragma once

#include "column_sum.cuh"

namespace peft_kernels {

constexpr long long kMostTiles = 1ll << 30;  // of a grid's first dimension, with room to spare
constexpr long long kMostParts = 65535;      // of its second

inline long long ceil_div(long long a, long long b) { return a / b + (a % b != 0); }

struct ColumnSumPlan {
  ColumnSum shape;
  long long tiles, parts;

  bool fits_a_grid() const { return tiles <= kMostTiles && parts <= kMostParts; }
  long long workspace_bytes() const { return parts > 1 ? parts * shape.N * static_cast<long long>(sizeof(float)) : 0; }
};

// Threads side by side along rows of `loads` loads: as many as there are, up to a warp; one where it is the rows that lie
// side by side; more than a warp only where the grid could not hold the tiles otherwise.
inline int lanes_for(long long loads, bool rows_are_adjacent) {
  const int most = rows_are_adjacent ? 1 : 32;
  int lanes = 1;
  while (lanes < kSumThreads && ((lanes < most && lanes < loads) || ceil_div(loads, lanes) > kMostTiles)) lanes *= 2;
  return lanes;
}

// The grid for M rows of N columns, `columns` per load and `blocks` at once on the GPU: one wave of them, or about four
// where the tiles of the columns alone are more than a quarter of one, so that the last wave's idle part stays small.
inline ColumnSumPlan plan_column_sum(long long M, long long N, int columns, long long blocks, bool rows_are_adjacent) {
  const int lanes = lanes_for(N / columns, rows_are_adjacent);
  const long long threads_along_rows = kSumThreads / lanes;
  const long long tiles = ceil_div(N / columns, lanes);
  if (M == 0) return {{M, N, 1, lanes}, tiles, 1};
  const long long enough = tiles * 4 <= blocks ? blocks / tiles : ceil_div(4 * blocks, tiles);
  const long long most = ceil_div(M, threads_along_rows * kBatch);  // a full batch for every thread
  const long long fewest = ceil_div(M, threads_along_rows * kMostRows);
  const long long wanted = enough < most ? enough : most;
  const long long rows_per_part = ceil_div(M, wanted > fewest ? wanted : fewest);
  return {{M, N, rows_per_part, lanes}, tiles, ceil_div(M, rows_per_part)};
}

template <int Chain, typename Rows, typename Out>
__global__ void __launch_bounds__(kSumThreads, Rows::kBlocksPerSm)
    column_sum_kernel(const Rows rows, Out* const out, const ColumnSum shape) {
  column_sum<Chain>(rows, out, shape);
}

template <int Chain, typename Rows, typename Out>
cudaError_t launch_column_sum(const Rows& rows, Out* out, const ColumnSumPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts));
  return launch(column_sum_kernel<Chain, Rows, Out>, grid, dim3(kSumThreads), 0, stream, rows, out, plan.shape);
}

// out [N] = sums of the columns of `rows`; workspace: plan.workspace_bytes().
template <typename Rows, typename Out>
cudaError_t sum_columns(const Rows& rows, Out* out, float* workspace, const ColumnSumPlan& plan, cudaStream_t stream) {
  if (plan.parts == 1) return launch_column_sum<kBatch>(rows, out, plan, stream);
  const cudaError_t error = launch_column_sum<kBatch>(rows, workspace, plan, stream);
  if (error != cudaSuccess) return error;
  const long long parts = plan.parts, N = plan.shape.N;
  const int lanes = lanes_for(N, false);
  const ColumnSumPlan one_part{{parts, N, parts, lanes}, ceil_div(N, lanes), 1};
  return launch_column_sum<1>(AnyRows<float>{workspace, N, 1}, out, one_part, stream);
}

}  // namespace peft_kernels
