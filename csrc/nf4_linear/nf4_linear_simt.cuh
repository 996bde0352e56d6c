// y = x W^T for one row of x or two (float32: up to four), in fp32 throughout: levels are not rounded.
//
// A warp takes four rows of W, a lane 16 bytes of each at once; x lies in shared memory in the order in which lanes
// read it. The warps that share rows (`ways`) take every so many steps of 1024 columns, and their sums are added in
// order.
//
// Floor: as for the tensor cores' kernel. A pair of levels is one lookup by its byte, in a table of which 16 lanes have
// a copy each, in banks of their own. Shared memory gives an SM 32 levels per clock: 16 bytes of weights, 13 with the
// loads of x, shared by four rows; an H100's HBM gives an SM 14.5, so this kernel stays within nine tenths of that. In
// flight: 64 bytes per lane, loaded a step ahead: 16 KB per block of 8 warps, of which two share an SM.
#pragma once

#include "nf4_linear_common.cuh"

namespace peft_kernels {

constexpr int kSimtRows = 4, kSimtWarps = 8, kSimtThreads = 32 * kSimtWarps;
constexpr int kLaneK = 32, kSimtStepK = 32 * kLaneK;  // columns of a lane, and of a warp, at once
constexpr int kSimtBytes = 32 << 10;                  // of x in shared memory at once
constexpr int kPairTableBytes = 256 * 16 * 8;

struct SimtPlan {
  int ways;   // warps that share rows: 1, 2, 4 or 8
  int shift;  // log2 of the blocksize
  bool wide_x;
};

template <typename T, int M>
constexpr int kSimtChunk = kSimtBytes / (M * static_cast<int>(sizeof(T)));

struct SimtStep {
  uint4 codes[kSimtRows];
  RawScale scales[kSimtRows];
};

// 32 columns from k on, if they are before K: x is zero behind it, where a step keeps what it held.
__device__ __forceinline__ void load_step(const Nf4Linear& a, int shift, const int64_t (&rows)[kSimtRows], int64_t k,
                                          SimtStep& step) {
  if (k >= a.K) return;
#pragma unroll
  for (int r = 0; r < kSimtRows; ++r)
    step.codes[r] = __ldcs(reinterpret_cast<const uint4*>(a.weight.packed + (rows[r] * a.K + k) / 2));
#pragma unroll
  for (int r = 0; r < kSimtRows; ++r) step.scales[r] = load_scale(a.weight, (rows[r] * a.K + k) >> shift);
}

// 16 copies of the pairs of levels, by byte; the high half of a byte comes first.
__device__ __forceinline__ void fill_pair_table(unsigned char* table, const Nf4Tables& tables) {
  const int byte = static_cast<int>(threadIdx.x);
  const unsigned high = __float_as_uint(tables.level[byte >> 4]), low = __float_as_uint(tables.level[byte & 15]);
#pragma unroll
  for (int i = 0; i < 8; ++i)  // neighbours begin at different banks
    reinterpret_cast<uint4*>(table)[byte * 8 + (i + byte) % 8] = {high, low, high, low};
}
static_assert(kSimtThreads == 256, "a thread fills in one byte's pairs");

// Sums of a way's warp, by way, row of W and row of x.
template <int M>
struct SimtSums {
  float of[kSimtWarps][kSimtRows][M];
};

template <typename T, int M>
__global__ void __launch_bounds__(kSimtThreads, M > 2 ? 1 : 2)
    nf4_linear_simt_kernel(const Nf4Linear a, const SimtPlan plan, const Nf4Tables tables) {
  constexpr int kChunk = kSimtChunk<T, M>, kPieces = kLaneK / kWide<T>, kPerWord = 8 / kWide<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int way = warp % plan.ways, teams = kSimtWarps / plan.ways;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * teams + warp / plan.ways) * kSimtRows;
  int64_t rows[kSimtRows];
#pragma unroll
  for (int r = 0; r < kSimtRows; ++r) rows[r] = row + r < a.N ? row + r : a.N - 1;
  int64_t k = way * kSimtStepK;
  const int64_t stride = plan.ways * kSimtStepK;
  SimtStep next = {};
  load_step(a, plan.shift, rows, k + lane * kLaneK, next);
  const ScaleTable scale_table(a.weight);
  unsigned char* const table = dynamic_shared();
  fill_pair_table(table, tables);
  // The pair of byte i of `word`: bits 7 to 14 of where it lies are the byte.
  const auto lookup = [own = table + lane % 16 * 8](unsigned word, int i) {
    const unsigned at = i == 0 ? word << 7 : word >> (8 * i - 7);
    return *reinterpret_cast<const float2*>(own + (at & 0x7f80u));
  };
  uint4* const x = reinterpret_cast<uint4*>(table + kPairTableBytes);  // [M, steps of the chunk, kPieces, 32 lanes]

  float sums[kSimtRows][M] = {};
  for (int64_t chunk = 0; chunk < a.K; chunk += kChunk) {
    __syncthreads();
    const int64_t left = ceil_div(a.K - chunk, kSimtStepK) * kSimtStepK;
    const int pieces = static_cast<int>(left < kChunk ? left : kChunk) / kWide<T>;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < M * pieces; i += kSimtThreads) {
      const int m = i / pieces, piece = i % pieces, step = piece / (32 * kPieces), j = piece % kPieces;
      x[m * (kChunk / kWide<T>) + step * 32 * kPieces + j * 32 + piece / kPieces % 32] =
          load_x<T>(a, plan.wide_x, m, chunk + static_cast<int64_t>(piece) * kWide<T>);
    }
    __syncthreads();
#pragma unroll 1
    for (; k < chunk + kChunk && k < a.K; k += stride) {
      const SimtStep step = next;
      load_step(a, plan.shift, rows, k + stride + lane * kLaneK, next);
      const uint4* const own_x = x + (k - chunk) / kWide<T> + lane;
      float parts[kSimtRows][M] = {};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float values[M][8];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < kPerWord; ++i) {
            float piece[kWide<T>];
            unpack<T>(own_x[m * (kChunk / kWide<T>) + (word * kPerWord + i) * 32], piece);
#pragma unroll
            for (int c = 0; c < kWide<T>; ++c) values[m][i * kWide<T> + c] = piece[c];
          }
        }
#pragma unroll
        for (int r = 0; r < kSimtRows; ++r) {
          const uint4& bits = step.codes[r];
          const unsigned codes = word == 0 ? bits.x : word == 1 ? bits.y : word == 2 ? bits.z : bits.w;
#pragma unroll
          for (int byte = 0; byte < 4; ++byte) {
            const float2 levels = lookup(codes, byte);
#pragma unroll
            for (int m = 0; m < M; ++m) {
              parts[r][m] = __fmaf_rn(levels.x, values[m][2 * byte], parts[r][m]);
              parts[r][m] = __fmaf_rn(levels.y, values[m][2 * byte + 1], parts[r][m]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kSimtRows; ++r) {
        const float scale = scale_table.scale(step.scales[r]);
#pragma unroll
        for (int m = 0; m < M; ++m) sums[r][m] = __fmaf_rn(scale, parts[r][m], sums[r][m]);
      }
    }
  }

  SimtSums<M>& shared_sums = shared<SimtSums<M>>();
#pragma unroll
  for (int r = 0; r < kSimtRows; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2)
        sums[r][m] = __fadd_rn(sums[r][m], __shfl_xor_sync(0xffffffffu, sums[r][m], bits));
      if (lane == 0) shared_sums.of[warp][r][m] = sums[r][m];
    }
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x), m = i / (teams * kSimtRows), r = i % kSimtRows;
  const int team = i / kSimtRows % teams;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * teams + team) * kSimtRows + r;
  if (m >= M || m >= a.M || n >= a.N) return;
  float sum = shared_sums.of[team * plan.ways][r][m];
  for (int w = 1; w < plan.ways; ++w) sum = __fadd_rn(sum, shared_sums.of[team * plan.ways + w][r][m]);
  finish<T>(a, m, n, sum);
}

}  // namespace peft_kernels
