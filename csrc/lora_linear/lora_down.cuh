// s = drop(x) @ a^T, with the dropout mask drawn on the way: see lora_x_common.cuh for the structure.
//
// The output tile is ROWS rows of x by all of R; a stage is 128 columns of x and of a. The mask of a stage is drawn
// while its loads are in flight, straight into the layout of the fragments it applies to.
#pragma once

#include "lora_dropout.cuh"
#include "lora_x_common.cuh"

namespace lora_passes {

struct DownMaps {
  CUtensorMap x, a;
};

struct DownProblem {
  void* s;
  int M, R;
  int stages;  // of 128 columns, in all
  int ctas;    // in a cluster, sharing those
  Dropout dropout;
};

// Tiles of 16 rows that a warp holds. Two use each fragment of a twice; at rank 128 they would not fit in registers.
constexpr int down_tiles(int padded_r) { return padded_r < 128 ? 2 : 1; }

template <int PADDED_R>
using DownSums = float[down_tiles(PADDED_R)][PADDED_R / 8][4];

// PADDED_R: R rounded up to 8, 16, 32, 64 or 128; rows of a beyond R are loaded as zeros.
template <int PADDED_R, int ROWS>
struct DownShape {
  static constexpr int kTiles = down_tiles(PADDED_R), kWarpRows = 16 * kTiles;
  static constexpr int kRowWarps = ROWS / kWarpRows;
  static constexpr int kGroups = kWarps / kRowWarps;  // of warps, that take the stages in turn
  static constexpr int kBoxX = ROWS * kRowBytes, kBoxA = PADDED_R * kRowBytes;
  static constexpr int kStageBytes = 2 * kBoxX + 2 * kBoxA;
  static constexpr int kStages = stage_count(kStageBytes, ctas_per_sm(PADDED_R), kGroups);
  static constexpr int kPitch = PADDED_R + 8;  // floats in a row of a part: no bank conflicts
  static constexpr int kPartBytes = ROWS * kPitch * 4;
  using Memory = Stages<kStages, kStageBytes>;
  static_assert(kGroups <= kStages && kStages >= 3);
  static_assert(kGroups * kPartBytes <= kStages * kStageBytes, "the parts lie where the stages were");
  static_assert(ctas_per_sm(PADDED_R) * (Memory::kBytes + 1024) <= 228 * 1024);
};

template <typename Shape>
__device__ __forceinline__ void produce_down(const typename Shape::Memory& memory, const CUtensorMap* x,
                                             const CUtensorMap* a, int row, Share share) {
  Ring<Shape::kStages> ring(0);
  for (int i = share.begin; i < share.end; ++i, ring.advance(1)) {
    barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);  // the first lap passes at once
    const uint32_t full = memory.full(ring.stage), stage = memory.stage(ring.stage);
    const int column = i * kStageColumns;
    barrier_expect(full, Shape::kStageBytes);
    tma_load(stage, x, full, column, row);
    tma_load(stage + Shape::kBoxX, x, full, column + 64, row);
    tma_load(stage + 2 * Shape::kBoxX, a, full, column, 0);
    tma_load(stage + 2 * Shape::kBoxX + Shape::kBoxA, a, full, column + 64, 0);
  }
}

// acc += x @ a^T over 16 columns of a stage for this warp's rows, from `row` of the tile on.
template <typename T, int PADDED_R, int ROWS, bool DROP, int STEP>
__device__ __forceinline__ void multiply_down(DownSums<PADDED_R>& acc, uint32_t stage, int row, int lane,
                                              const TileMask (&mask)[down_tiles(PADDED_R)]) {
  using Shape = DownShape<PADDED_R, ROWS>;
  constexpr int kBox = STEP / 4, kChunk = STEP % 4 * 2;
  const uint32_t box_x = stage + kBox * Shape::kBoxX, box_a = stage + 2 * Shape::kBoxX + kBox * Shape::kBoxA;
  const int matrix = lane / 8;
  uint32_t x[Shape::kTiles][4];
#pragma unroll
  for (int tile = 0; tile < Shape::kTiles; ++tile) {  // matrices: two halves of the rows, for eight columns, then eight
    const int row_x = row + 16 * tile + 8 * (matrix % 2) + lane % 8;
    load_4_matrices<false>(x[tile], box_x + swizzled(row_x, kChunk + matrix / 2));
    if constexpr (DROP) mask[tile].template apply<STEP>(x[tile]);
  }
  if constexpr (PADDED_R == 8) {
    uint32_t a0, a1;
    load_2_matrices<false>(a0, a1, box_a + swizzled(lane % 8, kChunk + matrix % 2));
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) mma_16x8x16<T>(acc[tile][0], x[tile], a0, a1);
  } else {
#pragma unroll
    for (int n = 0; n < PADDED_R / 8; n += 2) {  // matrices: both halves of the columns for eight rows, then the next
      uint32_t a[4];
      load_4_matrices<false>(a, box_a + swizzled(8 * n + 8 * (matrix / 2) + lane % 8, kChunk + matrix % 2));
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
        mma_16x8x16<T>(acc[tile][n], x[tile], a[0], a[1]);
        mma_16x8x16<T>(acc[tile][n + 1], x[tile], a[2], a[3]);
      }
    }
  }
}

template <typename T, int PADDED_R, int ROWS, bool DROP>
__device__ __forceinline__ void consume_down(DownSums<PADDED_R>& acc,
                                             const typename DownShape<PADDED_R, ROWS>::Memory& memory,
                                             const DownProblem& problem, int tile_row, Share share, int warp,
                                             int lane) {
  using Shape = DownShape<PADDED_R, ROWS>;
  const int group = warp / Shape::kRowWarps, row = warp % Shape::kRowWarps * Shape::kWarpRows;
  Ring<Shape::kStages> ring(group);
  TileMask mask[Shape::kTiles];
  Key key{};
  if constexpr (DROP) key = load_key(problem.dropout.seed);
  for (int i = share.begin + group; i < share.end; i += Shape::kGroups, ring.advance(Shape::kGroups)) {
    if constexpr (DROP) {
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
        mask[tile].draw(problem.dropout, key, tile_row + row + 16 * tile, i * (kStageColumns / 8), problem.M, lane);
      }
    }
    barrier_wait(memory.full(ring.stage), ring.parity);
    const uint32_t stage = memory.stage(ring.stage);
    multiply_down<T, PADDED_R, ROWS, DROP, 0>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 1>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 2>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 3>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 4>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 5>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 6>(acc, stage, row, lane, mask);
    multiply_down<T, PADDED_R, ROWS, DROP, 7>(acc, stage, row, lane, mask);
    __syncwarp();
    if (lane == 0) barrier_arrive(memory.empty(ring.stage));
  }
}

// The accumulators of a warp to its group's part: rows of PADDED_R floats.
template <int PADDED_R, int ROWS>
__device__ __forceinline__ void write_part_down(char* parts, const DownSums<PADDED_R>& acc, int warp, int lane) {
  using Shape = DownShape<PADDED_R, ROWS>;
  const int group = warp / Shape::kRowWarps, row = warp % Shape::kRowWarps * Shape::kWarpRows + lane / 4;
  float* part = reinterpret_cast<float*>(parts + group * Shape::kPartBytes) + row * Shape::kPitch + 2 * (lane % 4);
#pragma unroll
  for (int tile = 0; tile < Shape::kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < PADDED_R / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2* target = reinterpret_cast<float2*>(part + (16 * tile + 8 * half) * Shape::kPitch + 8 * n);
        *target = float2{acc[tile][n][2 * half], acc[tile][n][2 * half + 1]};
      }
    }
  }
}

// Items of four neighbouring columns of s.
template <typename T, int PADDED_R, int ROWS>
struct DownOutput {
  static constexpr int kItems = ROWS * PADDED_R / 4;
  const DownProblem& problem;
  int tile_row;

  static __device__ __forceinline__ int row(int item) { return item / (PADDED_R / 4); }
  static __device__ __forceinline__ int column(int item) { return item % (PADDED_R / 4) * 4; }
  __device__ __forceinline__ uint32_t offset(int item) const {
    return (row(item) * DownShape<PADDED_R, ROWS>::kPitch + column(item)) * 4;
  }
  __device__ __forceinline__ void store(int item, const float4& sum) const {
    const int64_t m = tile_row + row(item);
    const int r = column(item);
    if (m < problem.M && r < problem.R) store_rounded<T>(static_cast<T*>(problem.s) + m * problem.R + r, sum);
  }
};

template <typename T, int PADDED_R, int ROWS, bool DROP>
__global__ void __launch_bounds__(kBlockThreads, ctas_per_sm(PADDED_R))
    lora_down_kernel(const __grid_constant__ DownMaps maps, const __grid_constant__ DownProblem problem) {
  using Shape = DownShape<PADDED_R, ROWS>;
  extern __shared__ char raw[];
  const typename Shape::Memory memory(raw);
  char* parts = raw + (memory.base - smem_address(raw));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = cluster_rank(), tile_row = blockIdx.x / problem.ctas * ROWS;
  const Share share(problem.stages, problem.ctas, rank);
  if (threadIdx.x == kThreads) prefetch_map(&maps.x), prefetch_map(&maps.a);
  memory.start(Shape::kRowWarps);
  DownSums<PADDED_R> acc = {};
  if (warp == kWarps) {
    if (lane == 0) produce_down<Shape>(memory, &maps.x, &maps.a, tile_row, share);
    __syncwarp();
  } else {
    consume_down<T, PADDED_R, ROWS, DROP>(acc, memory, problem, tile_row, share, warp, lane);
  }
  __syncthreads();  // every stage is read: parts may take their place
  if (warp < kWarps) write_part_down<PADDED_R, ROWS>(parts, acc, warp, lane);
  const DownOutput<T, PADDED_R, ROWS> output{problem, tile_row};
  finish<Shape::kGroups, Shape::kPartBytes>(parts, output, problem.ctas, rank);
}

}  // namespace lora_passes
