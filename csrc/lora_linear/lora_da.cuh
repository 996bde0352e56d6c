// da = scaling * g^T @ drop(x), with the packed mask read: see lora_x_common.cuh for the structure.
//
// The output tile is 128 columns of x by all of R; a stage is 64 rows of x (those columns), of g and of the mask. Both
// operands lie along the rows of x, which mma sums over: ldmatrix transposes them.
#pragma once

#include "lora_x_common.cuh"

namespace lora_passes {

struct DaMaps {
  CUtensorMap x, g, mask;  // the mask in bytes
};

struct DaProblem {
  void* da;
  float scaling;
  int M, K, R;
  int stages;     // of 64 rows, in all
  int ctas;       // in a cluster, sharing those
  bool da_fp32;
};

constexpr int kDaRows = 64;  // of x in a stage
constexpr int kWarpColumns = 32;
constexpr int kColumnWarps = kStageColumns / kWarpColumns;
constexpr int kDaGroups = kWarps / kColumnWarps;  // of warps, that take the stages in turn

template <int PADDED_R>
struct DaShape {
  static constexpr int kBoxX = kDaRows * kRowBytes;
  static constexpr int kChunksG = PADDED_R < 64 ? PADDED_R / 8 : 8;  // of 16 bytes in a row of a box of g
  static constexpr int kBoxesG = PADDED_R <= 64 ? 1 : PADDED_R / 64;
  static constexpr int kBoxG = kDaRows * kChunksG * 16;
  static constexpr int kG = 2 * kBoxX, kMask = kG + kBoxesG * kBoxG;  // offsets in a stage
  static constexpr int kMaskBytes = kDaRows * kStageColumns / 8;
  static constexpr int kStageBytes = kMask + kMaskBytes;
  static constexpr int kStages = stage_count(kStageBytes, 1, kDaGroups);
  static constexpr int kPitch = kStageColumns + 4;  // floats in a row of a part: no bank conflicts
  static constexpr int kPartBytes = PADDED_R * kPitch * 4;
  using Memory = Stages<kStages, kStageBytes>;
  static_assert(kStageBytes % 1024 == 0 && kBoxG % 1024 == 0, "swizzled boxes");
  static_assert(kDaGroups <= kStages && kDaGroups * kPartBytes <= kStages * kStageBytes);
  static_assert(Memory::kBytes + 1024 <= 228 * 1024);

  // Where the box of g has a 16-byte chunk of a row. Narrow rows are packed and swizzled by as many bits as their
  // chunks have (TMA's 32, 64 and 128-byte swizzles; none for a single chunk).
  static __device__ __forceinline__ uint32_t chunk_of_g(int row, int chunk) {
    const uint32_t offset = (row * kChunksG + chunk % kChunksG) * 16;
    return chunk / kChunksG * kBoxG + (offset ^ (offset >> 7 & (kChunksG - 1)) << 4);
  }
};

// ---- producer ----

template <int PADDED_R, bool MASKED>
__device__ __forceinline__ void produce_da(const typename DaShape<PADDED_R>::Memory& memory, const DaMaps& maps,
                                           int column, Share share) {
  using Shape = DaShape<PADDED_R>;
  Ring<Shape::kStages> ring(0);
  for (int i = share.begin; i < share.end; ++i, ring.advance(1)) {
    barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);  // the first lap passes at once
    const uint32_t full = memory.full(ring.stage), stage = memory.stage(ring.stage);
    const int row = i * kDaRows;
    barrier_expect(full, Shape::kMask + (MASKED ? Shape::kMaskBytes : 0));
    tma_load(stage, &maps.x, full, column, row);
    tma_load(stage + Shape::kBoxX, &maps.x, full, column + 64, row);
#pragma unroll
    for (int box = 0; box < Shape::kBoxesG; ++box) {
      tma_load(stage + Shape::kG + box * Shape::kBoxG, &maps.g, full, 64 * box, row);
    }
    if constexpr (MASKED) tma_load(stage + Shape::kMask, &maps.mask, full, column / 8, row);
  }
}

// ---- consumers ----

// The mask of 16 rows by a warp's 32 columns for its transposed A fragments. A lane's column is l / 4 of every eight,
// its rows 2 (l % 4), the next, and these + 8; its bit of each byte is shifted to the top.
struct ColumnMask {
  uint32_t rows[4];

  __device__ __forceinline__ void load(uint32_t first_row, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * (lane % 4) + i % 2 + 8 * (i / 2);
      rows[i] = load_shared_word(first_row + 16 * row) << (7 - lane / 4);
    }
  }

  // For the fragment of the warp's columns 16 TILE and on.
  template <int TILE>
  __device__ __forceinline__ void apply(uint32_t (&a)[4]) const {
    a[0] &= spread_signs<2 * TILE>(rows[0], rows[1]);
    a[1] &= spread_signs<2 * TILE + 1>(rows[0], rows[1]);
    a[2] &= spread_signs<2 * TILE>(rows[2], rows[3]);
    a[3] &= spread_signs<2 * TILE + 1>(rows[2], rows[3]);
  }
};

// acc += x^T @ g over 16 rows of a stage, from `row` on, for the 32 columns of this column warp.
template <typename T, int PADDED_R, bool MASKED>
__device__ __forceinline__ void multiply_da(float (&acc)[2][PADDED_R / 8][4], uint32_t stage, int row, int column_warp,
                                            int lane) {
  using Shape = DaShape<PADDED_R>;
  const int matrix = lane / 8;
  const uint32_t box_x = stage + column_warp / 2 * Shape::kBoxX, box_g = stage + Shape::kG;
  uint32_t x[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {  // matrices: two groups of eight columns for eight rows, then for the next
    const int chunk = column_warp % 2 * 4 + 2 * tile + matrix % 2;
    load_4_matrices<true>(x[tile], box_x + swizzled(row + 8 * (matrix / 2) + lane % 8, chunk));
  }
  if constexpr (MASKED) {
    ColumnMask mask;
    mask.load(stage + Shape::kMask + 16 * row + 4 * column_warp, lane);
    mask.template apply<0>(x[0]);
    mask.template apply<1>(x[1]);
  }
  const int row_g = row + 8 * (matrix % 2) + lane % 8;
  if constexpr (PADDED_R == 8) {
    uint32_t g0, g1;
    load_2_matrices<true>(g0, g1, box_g + Shape::chunk_of_g(row_g, 0));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) mma_16x8x16<T>(acc[tile][0], x[tile], g0, g1);
  } else {
#pragma unroll
    for (int n = 0; n < PADDED_R / 8; n += 2) {  // matrices: both halves of the rows for eight of R, then the next
      uint32_t g[4];
      load_4_matrices<true>(g, box_g + Shape::chunk_of_g(row_g, n + matrix / 2));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma_16x8x16<T>(acc[tile][n], x[tile], g[0], g[1]);
        mma_16x8x16<T>(acc[tile][n + 1], x[tile], g[2], g[3]);
      }
    }
  }
}

template <typename T, int PADDED_R, bool MASKED>
__device__ __forceinline__ void consume_da(float (&acc)[2][PADDED_R / 8][4],
                                           const typename DaShape<PADDED_R>::Memory& memory, Share share, int warp,
                                           int lane) {
  using Shape = DaShape<PADDED_R>;
  const int group = warp / kColumnWarps, column_warp = warp % kColumnWarps;
  Ring<Shape::kStages> ring(group);
  for (int i = share.begin + group; i < share.end; i += kDaGroups, ring.advance(kDaGroups)) {
    barrier_wait(memory.full(ring.stage), ring.parity);
#pragma unroll
    for (int row = 0; row < kDaRows; row += 16) {
      multiply_da<T, PADDED_R, MASKED>(acc, memory.stage(ring.stage), row, column_warp, lane);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(memory.empty(ring.stage));
  }
}

// The accumulators of a warp to its group's part, transposed: rows of 128 columns, as in da.
template <int PADDED_R>
__device__ __forceinline__ void write_part_da(char* parts, const float (&acc)[2][PADDED_R / 8][4], int warp, int lane) {
  using Shape = DaShape<PADDED_R>;
  const int column = warp % kColumnWarps * kWarpColumns + lane / 4;
  float* part = reinterpret_cast<float*>(parts + warp / kColumnWarps * Shape::kPartBytes) + column;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int n = 0; n < PADDED_R / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = 8 * n + 2 * (lane % 4) + i % 2;
        part[r * Shape::kPitch + 16 * tile + 8 * (i / 2)] = acc[tile][n][i];
      }
    }
  }
}

// Items of four neighbouring columns of da.
template <typename T, int PADDED_R>
struct DaOutput {
  static constexpr int kRowItems = kStageColumns / 4, kItems = PADDED_R * kRowItems;
  const DaProblem& problem;
  int tile_column;

  __device__ __forceinline__ uint32_t offset(int item) const {
    return (item / kRowItems * DaShape<PADDED_R>::kPitch + item % kRowItems * 4) * 4;
  }
  __device__ __forceinline__ void store(int item, const float4& sum) const {
    const int r = item / kRowItems, k = tile_column + item % kRowItems * 4;
    if (r >= problem.R || k >= problem.K) return;
    const float f = problem.scaling;
    const float4 scaled{f * sum.x, f * sum.y, f * sum.z, f * sum.w};
    const int64_t at = static_cast<int64_t>(r) * problem.K + k;
    if (problem.da_fp32) {
      *reinterpret_cast<float4*>(static_cast<float*>(problem.da) + at) = scaled;
    } else {
      store_rounded<T>(static_cast<T*>(problem.da) + at, scaled);
    }
  }
};

template <typename T, int PADDED_R, bool MASKED>
__global__ void __launch_bounds__(kBlockThreads, 1)
    lora_da_kernel(const __grid_constant__ DaMaps maps, const __grid_constant__ DaProblem problem) {
  using Shape = DaShape<PADDED_R>;
  extern __shared__ char raw[];
  const typename Shape::Memory memory(raw);
  char* parts = raw + (memory.base - smem_address(raw));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = cluster_rank(), tile_column = blockIdx.x / problem.ctas * kStageColumns;
  const Share share(problem.stages, problem.ctas, rank);
  if (threadIdx.x == kThreads) prefetch_map(&maps.x), prefetch_map(&maps.g);
  memory.start(kColumnWarps);
  float acc[2][PADDED_R / 8][4] = {};
  if (warp == kWarps) {
    if (lane == 0) produce_da<PADDED_R, MASKED>(memory, maps, tile_column, share);
    __syncwarp();
  } else {
    consume_da<T, PADDED_R, MASKED>(acc, memory, share, warp, lane);
  }
  __syncthreads();  // every stage is read: parts may take their place
  if (warp < kWarps) write_part_da<PADDED_R>(parts, acc, warp, lane);
  const DaOutput<T, PADDED_R> output{problem, tile_column};
  finish<kDaGroups, Shape::kPartBytes>(parts, output, problem.ctas, rank);
}

}  // namespace lora_passes
