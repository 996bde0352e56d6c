// The Hopper LoRA GEMM: c = p @ q + alpha * drop(low @ t) + bias in one kernel, rounded once.
//
// One CTA per SM walks tiles of 128 x 256. Warpgroup 0 loads by TMA into a ring of stages; warpgroups 1 and 2 hold 64
// rows of the accumulator each and multiply by wgmma. A tile's first stages hold blocks of low and t: their product is
// scaled by alpha and masked, the bias is added, and p @ q is accumulated on top. So the rank costs its own multiplies
// and one drain of the tensor cores, and no second accumulator.
//
// A finished tile is rounded into half as many registers, and its way out (stmatrix, TMA store) is taken while the
// next tile's first wgmmas run: the tensor cores wait only for the rounding.
#pragma once

#include "../common/sm90_ptx.cuh"
#include "../common/sm90_ring.cuh"
#include "../common/sm90_wgmma.cuh"

namespace lora_sm90 {

using namespace peft_kernels::sm90;

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
constexpr int kStages = 4;
constexpr int kConsumers = 2;                               // warpgroups, 64 rows each
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // 128 * (24 + 2 * 240) = 384 * 168, the launch's

constexpr int kRowBytes = 128;                              // one swizzled row: 64 elements
constexpr int kBytesA = kTileM * kRowBytes;
constexpr int kBytesB = kTileN * kRowBytes;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kAtomBytes = kTileK * kRowBytes;              // MN-major B: 64 k of 64 n; four of them side by side
constexpr int kPieceRows = 16, kPieces = kTileN / 64;       // a warp stores its 16 rows in pieces of 64 columns
constexpr int kPieceBytes = kPieceRows * kRowBytes;
constexpr int kPieceBuffers = 2;
constexpr int kStagingBytes = kConsumerWarps * kPieceBuffers * kPieceBytes;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kStagingBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 232448, "227 KiB is what a Hopper CTA may have");

struct Maps {
  CUtensorMap p, q, low, t, c;
};

struct Problem {
  const unsigned char* mask;
  const void* bias;
  float alpha;
  int M, N;
  int rank_blocks, k_blocks;  // of 64; at least one each
  int rank, rank_start;       // columns of low, from rank_start on. Rank 0: a few outside the matrix, read as zeros
  int mask_pitch;
  bool mask_aligned;  // rows of the mask start on 16 bytes
  bool bias_fp32;
  int group;          // row tiles visited before the next column tile
};

// ---- tiles ----

struct Tile {
  int m, n;
};

// The order of tiles: groups of `group` row tiles share their columns of q in L2.
struct Schedule {
  int tiles_m, tiles_n, group;

  __device__ __forceinline__ explicit Schedule(const Problem& problem)
      : tiles_m((problem.M + kTileM - 1) / kTileM),
        tiles_n((problem.N + kTileN - 1) / kTileN),
        group(problem.group) {}

  __device__ __forceinline__ int begin() const { return blockIdx.x; }
  __device__ __forceinline__ int step() const { return gridDim.x; }
  __device__ __forceinline__ int end() const { return tiles_m * tiles_n; }

  __device__ __forceinline__ Tile tile(int number) const {
    const int first = number / (group * tiles_n) * group;
    const int rows = min(group, tiles_m - first);
    const int inside = number - first * tiles_n;
    return {(first + inside % rows) * kTileM, inside / rows * kTileN};
  }
};

struct Shared {
  uint32_t stages, staging, barriers;

  __device__ __forceinline__ explicit Shared(const void* memory) {
    stages = (smem_address(memory) + 1023) & ~1023u;
    staging = stages + kStages * kStageBytes;
    barriers = staging + kStagingBytes;
  }
  __device__ __forceinline__ uint32_t a(uint32_t stage) const { return stages + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t b(uint32_t stage) const { return a(stage) + kBytesA; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barriers + 8 * (kStages + stage); }
};

// ---- producer ----

// Loads one stage: 128 rows of `left` and 256 columns' worth of `right`, 64 deep from k.
template <bool Q_TRANSPOSED>
__device__ __forceinline__ void load_stage(const Shared& shared, const Ring<kStages>& ring, const CUtensorMap* left,
                                           const CUtensorMap* right, int k, Tile tile) {
  barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);  // the first lap passes at once
  const uint32_t full = shared.full(ring.stage);
  barrier_expect(full, kStageBytes);
  tma_load(shared.a(ring.stage), left, full, k, tile.m);
  const uint32_t b = shared.b(ring.stage);
  if constexpr (Q_TRANSPOSED) {
    tma_load(b, right, full, k, tile.n);
  } else {
#pragma unroll
    for (int atom = 0; atom < kTileN / 64; ++atom) {
      tma_load(b + atom * kAtomBytes, right, full, tile.n + atom * 64, k);
    }
  }
}

// The consumers read a tile's mask right before they need it; this has it in L2 by then. One 32-byte sector per row.
__device__ __forceinline__ void prefetch_mask(const Problem& problem, Tile tile, int lane) {
#pragma unroll
  for (int i = 0; i < kTileM / 32; ++i) {
    const int row = tile.m + lane + 32 * i;
    if (row < problem.M) prefetch_l2(problem.mask + static_cast<int64_t>(row) * problem.mask_pitch + tile.n / 8);
  }
}

template <bool Q_TRANSPOSED, bool HAS_MASK>
__device__ __forceinline__ void produce(const Maps& maps, const Problem& problem, const Shared& shared) {
  const int lane = threadIdx.x % 32;
  const Schedule schedule(problem);
  Ring<kStages> ring;
  for (int number = schedule.begin(); number < schedule.end(); number += schedule.step()) {
    const Tile tile = schedule.tile(number);
    if constexpr (HAS_MASK) prefetch_mask(problem, tile, lane);
    if (lane == 0) {
      for (int i = 0; i < problem.rank_blocks; ++i, ring.next()) {
        load_stage<Q_TRANSPOSED>(shared, ring, &maps.low, &maps.t, problem.rank_start + i * kTileK, tile);
      }
      for (int i = 0; i < problem.k_blocks; ++i, ring.next()) {
        load_stage<Q_TRANSPOSED>(shared, ring, &maps.p, &maps.q, i * kTileK, tile);
      }
    }
    __syncwarp();
  }
}

// ---- consumers: multiply ----

// Which accumulator values a thread holds [Register Fragments for wgmma.mma_async.m64nNk16]:
// acc[4 * j + 2 * h + e] is row 16 * warp + lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4) + e.
struct Lane {
  int group, warp, lane;

  // The shuffles say that a warp agrees on these, so that addresses made from them stay in uniform registers.
  __device__ __forceinline__ Lane()
      : group(__shfl_sync(~0u, threadIdx.x / 128, 0) - 1),
        warp(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int warp_row() const { return 64 * group + 16 * warp; }
  __device__ __forceinline__ int row() const { return warp_row() + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
};

// Lets the producer refill a stage. Each warp speaks for its own finished wgmmas.
__device__ __forceinline__ void release(const Shared& shared, uint32_t stage, int lane) {
  if (lane == 0) barrier_arrive(shared.empty(stage));
}

// Issues STEPS steps of 16 k on a stage: acc = (keep ? acc : 0) + a @ b. They run on after it returns.
template <typename T, bool Q_TRANSPOSED, int STEPS>
__device__ __forceinline__ void multiply_steps(float (&acc)[128], const Shared& shared, uint32_t stage, int group,
                                               bool keep) {
  constexpr uint64_t kSwizzle = OperandRows<64>::kSwizzle;
  constexpr uint64_t kRowsOfK = matrix_descriptor(kSwizzle, 16, 8 * kRowBytes);
  constexpr uint64_t kRowsOfN = matrix_descriptor(kSwizzle, kAtomBytes, 8 * kRowBytes);
  constexpr Major kMajorB = Q_TRANSPOSED ? Major::kK : Major::kMN;
  constexpr int kStepA = 32 >> 4;                                        // 16 k further along the row
  constexpr int kStepB = Q_TRANSPOSED ? kStepA : (16 * kRowBytes) >> 4;  // or 16 rows of one k each
  const uint64_t a = kRowsOfK | descriptor_address(shared.a(stage) + group * 64 * kRowBytes);
  const uint64_t b = (Q_TRANSPOSED ? kRowsOfK : kRowsOfN) | descriptor_address(shared.b(stage));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    wgmma<T, Major::kK, kMajorB>(acc, a + step * kStepA, b + step * kStepB, keep || step > 0);
  }
  wgmma_commit();
}

// Multiplies the ring's stage once it is full and moves on. One group of wgmmas stays in flight; when it is issued the
// previous one is done with its stage, which is then released if `previous` says that there was one.
template <typename T, bool Q_TRANSPOSED>
__device__ __forceinline__ void multiply_stage(float (&acc)[128], const Shared& shared, Ring<kStages>& ring,
                                               const Lane& at, int steps, bool keep, bool previous) {
  barrier_wait(shared.full(ring.stage), ring.parity);
  if (steps >= 4) {  // branches on whole groups: a wgmma in a branch of its own would be fenced off by the compiler
    multiply_steps<T, Q_TRANSPOSED, 4>(acc, shared, ring.stage, at.group, keep);
  } else if (steps == 3) {
    multiply_steps<T, Q_TRANSPOSED, 3>(acc, shared, ring.stage, at.group, keep);
  } else if (steps == 2) {
    multiply_steps<T, Q_TRANSPOSED, 2>(acc, shared, ring.stage, at.group, keep);
  } else {
    multiply_steps<T, Q_TRANSPOSED, 1>(acc, shared, ring.stage, at.group, keep);
  }
  wgmma_wait<1>();
  if (previous) release(shared, ring.previous(), at.lane);
  ring.next();
}

// ---- consumers: alpha, mask, bias ----

// The 256 mask bits of one row of a tile; outside the mask they are 0.
__device__ __forceinline__ void load_mask_row(uint32_t (&words)[8], const Problem& problem, int row, int n) {
  const unsigned char* bytes = problem.mask + static_cast<int64_t>(row) * problem.mask_pitch + n / 8;
  const int left = row < problem.M ? problem.mask_pitch - n / 8 : 0;
  if (problem.mask_aligned && left >= 32) {
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(bytes));
    const uint4 high = __ldg(reinterpret_cast<const uint4*>(bytes) + 1);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    words[i] = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (4 * i + b < left) words[i] |= static_cast<uint32_t>(__ldg(bytes + 4 * i + b)) << (8 * b);
    }
  }
}

// acc = alpha * drop(acc). Values that the mask drops become 0 whatever they are.
template <bool HAS_MASK>
__device__ __forceinline__ void scale(float (&acc)[128], float alpha, const uint32_t (&mask)[2][8]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) {
    const int j = i / 4, h = i / 2 % 2, e = i % 2;
    acc[i] *= alpha;
    if constexpr (HAS_MASK) acc[i] = (mask[h][j / 4] & (1u << (8 * (j % 4) + e))) != 0 ? acc[i] : 0.f;
  }
}

// The pair of values at a column, which is even; Raw is two elements.
template <typename T>
__device__ __forceinline__ float2 unpack_bias(float2 pair) { return pair; }
template <typename T>
__device__ __forceinline__ float2 unpack_bias(uint32_t pair) { return unpack<T>(pair); }

// acc += bias, from `column` on: this thread's first. Loads are batched, each batch one wait.
template <typename T, typename Raw>
__device__ __forceinline__ void add_bias(float (&acc)[128], const void* bias, int column, int N) {
  constexpr int kBatch = 64 / sizeof(Raw);
#pragma unroll
  for (int first = 0; first < kTileN / 8; first += kBatch) {
    Raw raw[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = column + 8 * (first + j);
      raw[j] = at < N ? __ldg(static_cast<const Raw*>(bias) + at / 2) : Raw{};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float2 pair = unpack_bias<T>(raw[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[4 * (first + j) + i] += i % 2 == 0 ? pair.x : pair.y;
    }
  }
}

// ---- consumers: the way out ----

// Rounds the accumulator: out[2 * j + h] holds the two neighbours acc[4 * j + 2 * h + 0 .. 1].
template <typename T>
__device__ __forceinline__ void round_tile(const float (&acc)[128], uint32_t (&out)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) out[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
}

// Sends PIECES of 64 columns of this warp's 16 rows from `out` to c, each through one of two swizzled buffers of the
// warp's own: no warp waits for another.
template <int FIRST, int PIECES>
__device__ __forceinline__ void store_pieces(const Maps& maps, const Shared& shared, const uint32_t (&out)[64],
                                             const Lane& at, Tile tile) {
  const int matrix = at.lane / 8;  // of each stmatrix: 0, 1 are rows 0-7 and 8-15 of 8 columns, 2, 3 of the next 8
  const int row = at.lane % 8 + 8 * (matrix % 2);
  const uint32_t buffers = shared.staging + (4 * at.group + at.warp) * kPieceBuffers * kPieceBytes;
#pragma unroll
  for (int piece = FIRST; piece < FIRST + PIECES; ++piece) {
    const uint32_t buffer = buffers + piece % kPieceBuffers * kPieceBytes;
    if (at.lane == 0) tma_store_wait<kPieceBuffers - 1>();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int chunk = 2 * pair + matrix / 2;  // of 8 columns; the swizzle moves it by the row
      const uint32_t* values = out + 16 * piece + 4 * pair;
      const uint32_t target = buffer + row * kRowBytes + ((chunk ^ (row % 8)) << 4);
      store_4_matrices(target, values[0], values[1], values[2], values[3]);
    }
    fence_async_proxy();
    __syncwarp();
    if (at.lane == 0) tma_store(&maps.c, buffer, tile.n + 64 * piece, tile.m + at.warp_row());
  }
}

// ---- consumers: all of it ----

template <typename T, bool Q_TRANSPOSED, bool HAS_MASK>
__device__ __forceinline__ void consume(const Maps& maps, const Problem& problem, const Shared& shared) {
  const Lane at;
  const Schedule schedule(problem);
  const bool plain = !HAS_MASK && problem.alpha == 1.f && problem.bias == nullptr;
  Ring<kStages> ring;
  float acc[128];
  uint32_t out[64];
  Tile last{-1, 0};
  Tile tile = schedule.tile(schedule.begin());
  for (int number = schedule.begin(); number < schedule.end(); number += schedule.step()) {
    uint32_t mask[2][8];
    if constexpr (HAS_MASK) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        load_mask_row(mask[h], problem, tile.m + at.row() + 8 * h, tile.n);
#pragma unroll
        for (int i = 0; i < 8; ++i) mask[h][i] >>= at.column();  // now every thread's bits are at 8 * j and 8 * j + 1
      }
      __syncwarp();  // its lanes may have taken different paths; wgmma wants them together
    }

    const auto multiply = [&](int steps, bool keep, bool previous) {
      multiply_stage<T, Q_TRANSPOSED>(acc, shared, ring, at, steps, keep, previous);
    };
    for (int i = 0; i < problem.rank_blocks; ++i) multiply((problem.rank - i * kTileK + 15) / 16, i > 0, i > 0);
    if (!plain) {
      wgmma_finish(acc);
      release(shared, ring.previous(), at.lane);
      scale<HAS_MASK>(acc, problem.alpha, mask);
      const int column = tile.n + at.column();
      if (problem.bias != nullptr && problem.bias_fp32) {
        add_bias<T, float2>(acc, problem.bias, column, problem.N);
      } else if (problem.bias != nullptr) {
        add_bias<T, uint32_t>(acc, problem.bias, column, problem.N);
      }
    }

    multiply(4, true, plain);
    if (last.m >= 0) store_pieces<0, 2>(maps, shared, out, at, last);
    if (problem.k_blocks > 1) multiply(4, true, true);
    if (last.m >= 0) store_pieces<2, 2>(maps, shared, out, at, last);
    last = tile;
    tile = schedule.tile(min(number + schedule.step(), schedule.end() - 1));
    asm volatile("" : "+r"(tile.m), "+r"(tile.n));  // its divisions are done here, while wgmmas run, not when they end
    for (int i = 2; i < problem.k_blocks; ++i) multiply(4, true, true);
    wgmma_finish(acc);
    release(shared, ring.previous(), at.lane);
    round_tile<T>(acc, out);
  }
  if (last.m >= 0) store_pieces<0, kPieces>(maps, shared, out, at, last);
  if (at.lane == 0) tma_store_wait<0>();
}

template <typename T, bool Q_TRANSPOSED, bool HAS_MASK>
__global__ void __launch_bounds__(kThreads, 1)
    lora_gemm_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Problem problem) {
  extern __shared__ unsigned char memory[];
  const Shared shared(memory);
  if (threadIdx.x == 0) {
    prefetch_map(&maps.low), prefetch_map(&maps.t), prefetch_map(&maps.p), prefetch_map(&maps.q), prefetch_map(&maps.c);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.full(i), 1);  // the producer's expect; the bytes do the rest
      barrier_init(shared.empty(i), kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give_back<kProducerRegisters>();
    if (threadIdx.x < 32) produce<Q_TRANSPOSED, HAS_MASK>(maps, problem, shared);
  } else {
    registers_claim<kConsumerRegisters>();
    consume<T, Q_TRANSPOSED, HAS_MASK>(maps, problem, shared);
  }
}

}  // namespace lora_sm90
