// y = x W^T for few rows of 16-bit x on tensor cores: W's rows are the 16 rows of m16n8k16, x's the 8 columns.
//
// The order of K within a block of scales is free if x has the same: lane t of the four that share a row takes bytes
// [tB, tB + B) of 4B, so that bytes are read in place, B at once, and become fragments without a move between lanes. A
// pair of weights is one lookup by its byte in a table of 256 words, of which every lane has a copy in a bank of its
// own. Levels alone are rounded to 16 bits: the products of at most 64 weights, which share a scale, are summed apart
// and then scaled in fp32.
//
// Floor: packed bytes and scales at HBM's bandwidth: 9.4 MB for [4096, 4096] in blocks of 64 (8.7 nested), 3.1 us at
// 3.0 TB/s. Shared memory gives an SM, per clock, one warp-wide lookup (32 bytes of weights) or a quarter of a fragment
// of 8 rows of x: 21 bytes of weights per clock for 8 rows, 16 for 16; with two tiles of W per warp 16 for 32 rows and
// 11 for 64. An H100's HBM gives an SM 14.5. In flight: 64 bytes per lane and tile, loaded a step ahead: 16 KB for each
// block of 8 tiles, of which two share an SM, twice what the latency asks for.
#pragma once

#include "../common/mma.cuh"
#include "nf4_linear_common.cuh"

namespace peft_kernels {

constexpr int kTileRows = 16, kTiles = 8;       // of W; tiles of a block of threads
constexpr int kBlockRows = kTileRows * kTiles;  // of W
constexpr int kStepK = 256;                     // columns of W that a warp takes at once
constexpr int kTableBytes = 256 * 32 * 4;
constexpr int kPitch = 64;  // bytes between rows of x in shared memory: odd and even rows lie on different banks

struct MmaPlan {
  long long splits, k_per_split;  // parts of K, each a multiple of kStepK
  int shift;                      // log2 of the blocksize
  bool wide_x;
};

// Columns of x in shared memory at once, for so many tiles of 8 rows of x, and the bytes of it all.
__host__ __device__ constexpr int chunk_k(int column_tiles) {
  return column_tiles <= 2 ? 1024 : column_tiles <= 4 ? 512 : 256;
}
static_assert(8 * 8 * (kBlockRows + 4) * 4 <= kTableBytes + 64 * kPitch, "sums replace the table");
constexpr int dynamic_bytes(int column_tiles) {
  return kTableBytes + 8 * column_tiles * (2 * chunk_k(column_tiles) + kPitch);
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  mma_m16n8k16_f16(c, a, b);
}
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                         __nv_bfloat16) {
  mma_m16n8k16_bf16(c, a, b);
}

// 32 copies of the words of two levels, by byte; the high half of a byte comes first.
template <typename T>
__device__ __forceinline__ void fill_table(unsigned char* table, const Nf4Tables& tables) {
  for (int byte = static_cast<int>(threadIdx.x); byte < 256; byte += static_cast<int>(blockDim.x)) {
    const float pair[2] = {tables.level[byte >> 4], tables.level[byte & 15]};
    const unsigned word = pack_word(pair, T{});
#pragma unroll
    for (int i = 0; i < 8; ++i)  // neighbours begin at different banks
      reinterpret_cast<uint4*>(table)[byte * 8 + (i + byte) % 8] = {word, word, word, word};
  }
}

template <int Bytes>
__device__ __forceinline__ void load_words(const uint8_t* p, unsigned* words) {
  if constexpr (Bytes == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
  } else if constexpr (Bytes == 8) {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(p));
    words[0] = bits.x, words[1] = bits.y;
  } else {
    words[0] = __ldcs(reinterpret_cast<const unsigned*>(p));
  }
}

// What a warp needs of W for kStepK columns: bytes of rows g and g + 8 of each tile, and a lane's share of the scales.
// Each group of bytes is loaded again, for the step to come, as soon as it has become fragments. Behind the end of K a
// group keeps what it held: x is zero there.
template <int Tiles, int Bytes>
struct MmaRows {
  static constexpr int kGroupK = 8 * Bytes, kGroups = kStepK / kGroupK, kScales = (kGroups + 3) / 4;
  const uint8_t* packed;  // of the lane in its first row
  int64_t block;          // of scales, that its first row begins with
  int rows_on[2 * Tiles];  // elements from the first row to each
  unsigned words[Tiles][2][8];
  RawScale scales[Tiles][2][kScales];

  // Row `row` of W is the lane's first. Rows that W lacks are its last one.
  __device__ __forceinline__ MmaRows(const Nf4Linear& a, int shift, int64_t row) : words(), scales() {
    const int64_t first = row < a.N ? row : a.N - 1;
    packed = a.weight.packed + first * a.K / 2 + threadIdx.x % 4 * Bytes;
    block = first * a.K >> shift;
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i)
      rows_on[i] = static_cast<int>((8 * i < a.N - first ? 8 * i : a.N - 1 - first) * a.K);
  }
  __device__ __forceinline__ void load_group(int group, int k, int end) {
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i)
      if (k + group * kGroupK < end)
        load_words<Bytes>(packed + (rows_on[i] + k) / 2 + group * 4 * Bytes, words[i / 2][i % 2] + group * (Bytes / 4));
  }
  __device__ __forceinline__ void load_scales(const Nf4Weight& weight, int shift, int k, int end) {
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      const int column = k + (static_cast<int>(threadIdx.x) % 4 + 4 * j) % kGroups * kGroupK;
#pragma unroll
      for (int i = 0; i < 2 * Tiles; ++i)
        if (column < end) scales[i / 2][i % 2][j] = load_scale(weight, block + ((rows_on[i] + column) >> shift));
    }
  }
};

// Some rows of x, columns k to k + columns, into shared memory in the order in which lanes read it: of the pieces of 8
// columns of a group, those of the four lanes lie side by side.
template <typename T, int Bytes>
__device__ __forceinline__ void stage_x(const Nf4Linear& a, bool wide, unsigned char* x, int rows, int row_bytes,
                                        int64_t k, int columns) {
  constexpr int kEach = Bytes / 4;  // pieces of a lane in a group
  const int pieces = columns / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += static_cast<int>(blockDim.x)) {
    const int m = i / pieces, piece = i % pieces, group = piece / Bytes, t = piece % Bytes / kEach, j = piece % kEach;
    *reinterpret_cast<uint4*>(x + m * row_bytes + (group * Bytes + j * 4 + t) * 16) =
        load_x<T>(a, wide, m, k + piece * 8);
  }
}

// Tiles: of W per warp; ColumnTiles: of 8 rows of x; Bytes: of a row of W that a lane takes at once: 4, 8 and 16 for
// blocks of 32, of 64 and longer ones.
template <typename T, int Tiles, int ColumnTiles, int Bytes>
__global__ void __launch_bounds__(32 * kTiles / Tiles, 2)
    nf4_linear_mma_kernel(const Nf4Linear a, const MmaPlan plan, const Nf4Tables tables) {
  using Rows = MmaRows<Tiles, Bytes>;
  constexpr int kPartWords = Bytes < 8 ? 1 : 2, kParts = 8 / kPartWords;  // words whose products are summed apart
  constexpr int kChunk = chunk_k(ColumnTiles), kRowBytes = 2 * kChunk + kPitch;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  unsigned char* const table = dynamic_shared();
  unsigned char* const x = table + kTableBytes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlockRows + warp * Tiles * kTileRows + g;
  const int k_per_split = static_cast<int>(plan.k_per_split), K = static_cast<int>(a.K);
  const int begin = static_cast<int>(blockIdx.y) * k_per_split, end = begin + k_per_split < K ? begin + k_per_split : K;
  Rows rows(a, plan.shift, row);
#pragma unroll
  for (int group = 0; group < Rows::kGroups; ++group) rows.load_group(group, begin, end);
  rows.load_scales(a.weight, plan.shift, begin, end);
  const ScaleTable scale_table(a.weight);
  fill_table<T>(table, tables);
  // The word of byte i of `word`: bits 7 to 14 of where it lies are the byte.
  const auto lookup = [own = table + 4 * lane](unsigned word, int i) {
    const unsigned at = i == 0 ? word << 7 : word >> (8 * i - 7);
    return *reinterpret_cast<const unsigned*>(own + (at & 0x7f80u));
  };

  float sums[Tiles][ColumnTiles][4] = {};
  for (int chunk = begin; chunk < end; chunk += kChunk) {
    __syncthreads();
    const int left = (end - chunk + kStepK - 1) / kStepK * kStepK;
    stage_x<T, Bytes>(a, plan.wide_x, x, 8 * ColumnTiles, kRowBytes, chunk, left < kChunk ? left : kChunk);
    __syncthreads();
#pragma unroll 1
    for (int k = chunk; k < chunk + kChunk && k < end; k += kStepK) {
      float scales[Tiles][2][Rows::kScales];
#pragma unroll
      for (int i = 0; i < 2 * Tiles * Rows::kScales; ++i) {
        constexpr int kEach = Rows::kScales;
        scales[i / kEach / 2][i / kEach % 2][i % kEach] =
            scale_table.scale(rows.scales[i / kEach / 2][i / kEach % 2][i % kEach]);
      }
      rows.load_scales(a.weight, plan.shift, k + kStepK, end);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int group = part * kPartWords / (Bytes / 4);
        if (part > 0 && k + group * Rows::kGroupK >= end) break;
        unsigned fragments[Tiles][2 * kPartWords][4];
        float factors[Tiles][2];
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) {
          factors[i / 2][i % 2] = __shfl_sync(0xffffffffu, scales[i / 2][i % 2][group / 4], (lane & ~3) | (group & 3));
#pragma unroll
          for (int byte = 0; byte < 4 * kPartWords; ++byte)
            fragments[i / 2][byte / 2][i % 2 + byte % 2 * 2] =
                lookup(rows.words[i / 2][i % 2][part * kPartWords + byte / 4], byte % 4);
        }
        if ((part + 1) * kPartWords % (Bytes / 4) == 0) rows.load_group(group, k + kStepK, end);
#pragma unroll
        for (int column = 0; column < ColumnTiles; ++column) {
          if (column > 1 && column / 2 * 16 >= a.M) continue;  // a branch for every two: no more products held at once
          const unsigned char* const own_x = x + (column * 8 + g) * kRowBytes + (k - chunk) * 2 + t * 16;
          unsigned b[2 * kPartWords][2];
#pragma unroll
          for (int i = 0; i < kPartWords; ++i) {
            const uint4 piece = *reinterpret_cast<const uint4*>(own_x + (part * kPartWords + i) * 64);
            b[2 * i][0] = piece.x, b[2 * i][1] = piece.y, b[2 * i + 1][0] = piece.z, b[2 * i + 1][1] = piece.w;
          }
#pragma unroll
          for (int tile = 0; tile < Tiles; ++tile) {
            float products[4] = {};
#pragma unroll
            for (int i = 0; i < 2 * kPartWords; ++i) multiply(products, fragments[tile][i], b[i], T{});
#pragma unroll
            for (int i = 0; i < 4; ++i)
              sums[tile][column][i] = __fmaf_rn(factors[tile][i / 2], products[i], sums[tile][column][i]);
          }
        }
      }
    }
  }

  // By way of shared memory, so that neighbours write side by side.
  __syncthreads();
  float* const block = reinterpret_cast<float*>(table);  // [8 * ColumnTiles, kBlockRows + 4]
#pragma unroll
  for (int i = 0; i < 4 * Tiles * ColumnTiles; ++i) {
    const int tile = i / 4 / ColumnTiles, column = i / 4 % ColumnTiles;
    const int n = (warp * Tiles + tile) * kTileRows + g + i % 4 / 2 * 8, m = column * 8 + 2 * t + i % 2;
    block[m * (kBlockRows + 4) + n] = sums[tile][column][i % 4];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < a.M * kBlockRows; i += static_cast<int>(blockDim.x)) {
    const int64_t m = i / kBlockRows, n = static_cast<int64_t>(blockIdx.x) * kBlockRows + i % kBlockRows;
    const float sum = block[m * (kBlockRows + 4) + i % kBlockRows];
    if (n >= a.N) continue;
    if (plan.splits == 1)
      finish<T>(a, m, n, sum);
    else
      a.workspace[(blockIdx.y * a.M + m) * a.N + n] = sum;
  }
}

// y from the parts' sums, added in their order.
template <typename T>
__global__ void __launch_bounds__(256) nf4_linear_parts_kernel(const Nf4Linear a, const int64_t parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, size = a.M * a.N;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) sum = __fadd_rn(sum, __ldg(a.workspace + part * size + i));
  finish<T>(a, i / a.N, i % a.N, sum);
}

}  // namespace peft_kernels
