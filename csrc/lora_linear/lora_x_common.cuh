// What both passes share: the block, the ring of stages, and the end, where the parts of a sum meet.
//
// Both passes stream x once through shared memory and keep their whole output tile in registers. One producer warp
// loads stages by TMA into a ring; eight warps multiply. A warp holds 16 or 32 rows of the output tile and all of R;
// where that makes fewer than eight warps, they form groups that take the stages in turn. Where there are too
// few tiles for the GPU, the CTAs of a cluster share one, each with a part of the stages. All these partial sums are
// added in a fixed order through shared memory, so the bits do not depend on timing.
#pragma once

#include "../common/sm90_ptx.cuh"
#include "../common/sm90_ring.cuh"

namespace lora_passes {

using namespace peft_kernels::sm90;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;             // those that multiply
constexpr int kBlockThreads = kThreads + 32;      // and the producer warp
constexpr int kRowBytes = 128;                    // a swizzled row of x: 64 elements. Two such boxes make a stage
constexpr int kStageColumns = 128;
constexpr int kMostCtas = 8;                      // in a cluster: the portable limit

// Up to rank 16 two CTAs of "down" fit on an SM, which the drawing of a mask needs: 29 us instead of 54 at M=8192,
// K=4096. Above, the accumulators take more than the 96 registers that this leaves a thread: of nine warps three share a
// quarter of the SM.
constexpr int ctas_per_sm(int padded_r) { return padded_r < 32 ? 2 : 1; }

// 227 KiB of shared memory serve an SM's CTAs, each of which costs one more; 2 KiB are for alignment and barriers. A
// multiple of the groups of warps: a stage that changed hands could be waited for by its next group before its first
// load had landed, and that wait would end at once.
constexpr int stage_count(int stage_bytes, int per_sm, int groups) {
  const int room = (per_sm == 2 ? 112 : 208) * 1024 - 2048;
  const int stages = room / stage_bytes < 8 ? room / stage_bytes : 8;
  return stages / groups * groups;
}

// The 128-byte swizzle: in each row of 128 bytes the 16-byte chunks are permuted by the row (boxes start at 1024).
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row % 8)) << 4);
}

// The shared memory of a CTA: stages, then two barriers for each.
template <int STAGES, int STAGE_BYTES>
struct Stages {
  static constexpr int kBytes = 1024 + STAGES * (STAGE_BYTES + 16);
  uint32_t base;

  __device__ __forceinline__ explicit Stages(const void* memory) : base((smem_address(memory) + 1023) & ~1023u) {}
  __device__ __forceinline__ uint32_t stage(uint32_t i) const { return base + i * STAGE_BYTES; }
  __device__ __forceinline__ uint32_t full(uint32_t i) const { return base + STAGES * STAGE_BYTES + 8 * i; }
  __device__ __forceinline__ uint32_t empty(uint32_t i) const { return full(STAGES + i); }

  // For every thread. What a previous kernel wrote may be touched only after this.
  __device__ __forceinline__ void start(int empty_arrivals) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < STAGES; ++i) {
        barrier_init(full(i), 1);  // the producer's expect; the bytes do the rest
        barrier_init(empty(i), empty_arrivals);
      }
      fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous_kernels();
    let_next_kernel_start();
  }
};

// The share of the stages that a CTA of a cluster takes.
struct Share {
  int begin, end;

  __device__ __forceinline__ Share(int stages, int ctas, int rank)
      : begin(static_cast<int>(static_cast<int64_t>(stages) * rank / ctas)),
        end(static_cast<int>(static_cast<int64_t>(stages) * (rank + 1) / ctas)) {}
};

// ---- the end ----

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Output describes the tile as items of four floats: kItems of them, offset(item) bytes into a part, and
// store(item, sum) to global memory.
//
// The sum of this CTA's parts, for every item, is stored, or left in part 0 for the rest of the cluster.
template <int PARTS, int PART_BYTES, typename Output>
__device__ __forceinline__ void sum_parts(char* parts, const Output& output, bool alone) {
  for (int item = threadIdx.x; item < Output::kItems; item += kThreads) {
    float4* first = reinterpret_cast<float4*>(parts + output.offset(item));
    float4 sum = *first;
#pragma unroll
    for (int i = 1; i < PARTS; ++i) sum = sum + first[i * (PART_BYTES / 16)];
    if (alone) {
      output.store(item, sum);
    } else {
      *first = sum;
    }
  }
}

// This CTA's share of the items, each summed over the cluster in the order of the ranks.
template <int CTAS, typename Output>
__device__ __forceinline__ void sum_cluster(uint32_t parts, const Output& output, int rank) {
  for (int item = rank * kThreads + threadIdx.x; item < Output::kItems; item += CTAS * kThreads) {
    float4 from[CTAS];
#pragma unroll
    for (int i = 0; i < CTAS; ++i) from[i] = load_from_cta(parts + output.offset(item), i);
    float4 sum = from[0];
#pragma unroll
    for (int i = 1; i < CTAS; ++i) sum = sum + from[i];
    output.store(item, sum);
  }
}

// For every thread of the cluster, the producer too, once this CTA's parts are written.
template <int PARTS, int PART_BYTES, typename Output>
__device__ __forceinline__ void finish(char* parts, const Output& output, int ctas, int rank) {
  const bool multiplies = threadIdx.x < kThreads;
  __syncthreads();
  if (multiplies) sum_parts<PARTS, PART_BYTES>(parts, output, ctas == 1);
  if (ctas == 1) return;
  cluster_sync();
  if (multiplies) {
    const uint32_t address = smem_address(parts);
    if (ctas == 2) sum_cluster<2>(address, output, rank);
    if (ctas == 4) sum_cluster<4>(address, output, rank);
    if (ctas == 8) sum_cluster<8>(address, output, rank);
  }
  cluster_sync();  // nobody leaves while others read its shared memory
}

// Four neighbours, rounded to T.
template <typename T>
__device__ __forceinline__ void store_rounded(void* target, const float4& v) {
  *static_cast<uint2*>(target) = uint2{pack<T>(v.x, v.y), pack<T>(v.z, v.w)};
}

}  // namespace lora_passes
