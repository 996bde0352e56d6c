// The pass over dy on Hopper: g = dy @ b, db = scaling * dy.T @ s, dbias = dy.sum(0) from one read of dy.
//
// A CTA owns up to 512 columns and walks its rows in steps of 64. One warp streams boxes of 64 rows x 64 columns by TMA
// into a ring of stages (two boxes each); two warpgroups multiply them by wgmma, both products straight from the same
// swizzled tile. db and dbias (a product with ones) stay in registers until the last row. b's rows stay in shared
// memory; each warpgroup makes half of g's columns.
//
// After each step the g of the step is a sum over the cluster's CTAs: every CTA owns 64 / cluster of the rows, the
// others send it their part (st.async) and it adds them up one step later, while the next step's data arrive. So g
// leaves partial sums in global memory only where one cluster is narrower than dy, and db one per row part.
#pragma once

#include "../common/sm90_ptx.cuh"
#include "../common/sm90_ring.cuh"
#include "../common/sm90_wgmma.cuh"

namespace lora_dy {

using namespace peft_kernels::sm90;

constexpr int kStepRows = 64;
constexpr int kWarpgroups = 2;
constexpr int kConsumerThreads = 128 * kWarpgroups;
constexpr int kConsumerWarps = 4 * kWarpgroups;
constexpr int kThreads = kConsumerThreads + 128;         // a third warpgroup, one thread of which loads
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // 128 * (24 + 2 * 240) = 384 * 168, the launch's
constexpr int kChunk = 64;                               // columns of one box, one swizzled row of 128 bytes
constexpr int kBoxBytes = kStepRows * kChunk * 2;
constexpr int kStageBytes = kWarpgroups * kBoxBytes;     // each warpgroup makes db of one of the two boxes
constexpr int kMostShared = 232448;                      // 227 KiB is what a Hopper CTA may have
constexpr int kSmallShared = 1024;                       // the ones, the barriers
constexpr int kMostStages = 12;

struct Maps {
  CUtensorMap dy, b, s;
};

// Where an output goes: the final values, or one fp32 partial sum per part.
struct Output {
  void* data;       // null: not wanted
  long long pitch;  // elements from part to part; 0 if these are the final values
  float scale;      // of the final values
  bool fp32;
};

struct Problem {
  Output g, db, dbias;
  int M, N, R;
  int chunks;  // of 64 columns per CTA
  int tiles;   // of 64 rows in all
  int span;    // of them per row part
};

// Shared memory for ranks up to RP and CH stages per step.
template <int RP, int CH>
struct Layout {
  static constexpr int kHalf = RP / 2;                        // columns of g per warpgroup
  static constexpr int kBoxB = kChunk * kHalf * 2;            // b: [half][chunk] boxes of 64 rows x kHalf columns
  static constexpr int kBytesB = kWarpgroups * 2 * CH * kBoxB;
  static constexpr int kBytesS = kStepRows * RP * 2;          // s: two slots
  static constexpr int kBytesG = kStepRows * RP * 4;          // parts of g that arrive: two slots
  static constexpr int kFixed = 1024 + kBytesB + 2 * kBytesS + 2 * kBytesG + kSmallShared;  // 1024: for alignment
  static constexpr int kFit = (kMostShared - kFixed) / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kShared = kFixed + kStages * kStageBytes;
  static_assert(kStages >= 4, "enough bytes in flight");

  uint32_t base;

  __device__ __forceinline__ explicit Layout(const void* memory) : base((smem_address(memory) + 1023) & ~1023u) {}
  __device__ __forceinline__ uint32_t box(uint32_t stage, int which) const {
    return base + stage * kStageBytes + which * kBoxBytes;
  }
  __device__ __forceinline__ uint32_t b(int half, int chunk) const {
    return base + kStages * kStageBytes + (half * 2 * CH + chunk) * kBoxB;
  }
  __device__ __forceinline__ uint32_t s(int slot) const { return b(0, 0) + kBytesB + slot * kBytesS; }
  __device__ __forceinline__ uint32_t g(int slot) const { return s(2) + slot * kBytesG; }
  __device__ __forceinline__ uint32_t ones() const { return g(2); }
  __device__ __forceinline__ uint32_t barrier(int index) const { return ones() + 512 + 8 * index; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barrier(kStages + stage); }
  __device__ __forceinline__ uint32_t b_full() const { return barrier(2 * kStages); }
  __device__ __forceinline__ uint32_t s_full(int slot) const { return barrier(2 * kStages + 1 + slot); }
  __device__ __forceinline__ uint32_t s_empty(int slot) const { return barrier(2 * kStages + 3 + slot); }
  __device__ __forceinline__ uint32_t g_full(int slot) const { return barrier(2 * kStages + 5 + slot); }
};
static_assert(512 + 8 * (2 * kMostStages + 7) <= kSmallShared, "the barriers fit");

// This CTA's share: CTA x owns the columns from x * 64 * chunks on, CTAs y the row tiles [first, first + steps).
struct Share {
  int column, first, steps;

  __device__ __forceinline__ explicit Share(const Problem& problem)
      : column(blockIdx.x * problem.chunks * kChunk),
        first(blockIdx.y * problem.span),
        steps(min(problem.span, problem.tiles - first)) {}
};

// ---- producer: one thread ----

template <int RP, int CH>
__device__ __forceinline__ void load_b(const Maps& maps, const Problem& problem, const Layout<RP, CH>& shared,
                                       const Share& share) {
  using L = Layout<RP, CH>;
  barrier_expect(shared.b_full(), L::kBytesB);
  for (int chunk = 0; chunk < 2 * CH; ++chunk) {
    // A chunk past this CTA's last one is read outside of b: zeros, and no traffic.
    const int row = chunk < problem.chunks ? share.column + chunk * kChunk : problem.N;
    for (int half = 0; half < kWarpgroups; ++half) {
      tma_load(shared.b(half, chunk), &maps.b, shared.b_full(), half * L::kHalf, row);
    }
  }
}

// The rows of s of one step; ranks above 64 are two boxes side by side.
template <int RP, int CH>
__device__ __forceinline__ void load_s(const Maps& maps, const Layout<RP, CH>& shared, int step, int row) {
  const int slot = step % 2;
  barrier_wait(shared.s_empty(slot), (step / 2 & 1) ^ 1);  // the first two pass at once
  barrier_expect(shared.s_full(slot), Layout<RP, CH>::kBytesS);
  for (int column = 0; column < RP; column += kChunk) {
    tma_load(shared.s(slot) + column / kChunk * kBoxBytes, &maps.s, shared.s_full(slot), column, row);
  }
}

template <int RP, int CH>
__device__ __forceinline__ void produce(const Maps& maps, const Problem& problem, const Layout<RP, CH>& shared) {
  const Share share(problem);
  Ring<Layout<RP, CH>::kStages> ring;
  if (problem.g.data != nullptr) load_b<RP, CH>(maps, problem, shared, share);
  for (int step = 0; step < share.steps; ++step) {
    const int row = (share.first + step) * kStepRows;
    if (problem.db.data != nullptr) load_s<RP, CH>(maps, shared, step, row);
    for (int chunk = 0; chunk < 2 * CH; chunk += kWarpgroups, ring.next()) {
      barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      barrier_expect(shared.full(ring.stage), kStageBytes);
      for (int which = 0; which < kWarpgroups; ++which) {
        const int column = share.column + (chunk + which) * kChunk;
        tma_load(shared.box(ring.stage, which), &maps.dy, shared.full(ring.stage),
                 chunk + which < problem.chunks ? column : problem.N, row);
      }
    }
  }
}

// ---- consumers: multiply ----

// Which accumulator values a thread holds [Register Fragments for wgmma.mma_async.m64nNk16]:
// acc[4 * j + 2 * h + e] is row 16 * warp + 8 * h + lane / 4, column 8 * j + 2 * (lane % 4) + e.
struct Lane {
  int group, warp, lane;

  // The shuffles say that a warp agrees on these, so that addresses made from them stay in uniform registers.
  __device__ __forceinline__ Lane()
      : group(__shfl_sync(~0u, threadIdx.x / 128, 0)),
        warp(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int row(int h) const { return 16 * warp + 8 * h + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
  __device__ __forceinline__ int thread() const { return 128 * group + 32 * warp + lane; }
};

template <int RP, int CH>
struct Sums {
  float g[RP / 4];        // [64 rows, RP / 2]: of this step, over this CTA's columns
  float db[CH][RP / 2];   // [64 columns, RP]: of each stage's box of this warpgroup
  float dbias[CH][4];     // [64 columns, 8]: all eight the same

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int j = 0; j < CH; ++j) {
#pragma unroll
      for (int i = 0; i < RP / 2; ++i) db[j][i] = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) dbias[j][i] = 0.f;
    }
  }
};

// Issues all products with one stage: g += box @ b over both boxes, db[j] += own box.T @ s, dbias[j] += own box.T @ 1.
template <typename T, int J, int RP, int CH>
__device__ __forceinline__ void multiply_stage(Sums<RP, CH>& sums, const Layout<RP, CH>& shared, uint32_t stage,
                                               int slot, const Lane& at) {
  using L = Layout<RP, CH>;
  constexpr uint64_t kRowsOfG = matrix_descriptor(1, 16, 1024);  // either way the stride leads to the next 8 rows of dy
  constexpr uint64_t kRowsOfSum = matrix_descriptor(1, 1024, 1024);
  constexpr uint64_t kDescriptorB = k_rows_descriptor<L::kHalf>(kChunk);
  constexpr uint64_t kDescriptorS = k_rows_descriptor<RP>(kStepRows);
  constexpr int kStepB = 16 * OperandRows<L::kHalf>::kBytes >> 4;     // 16 k further
  constexpr int kStepS = 16 * OperandRows<RP>::kBytes >> 4;
  constexpr int kStepColumns = 32 >> 4, kStepRows16 = 16 * 128 >> 4;  // the same in dy
  wgmma_fence();
#pragma unroll
  for (int which = 0; which < kWarpgroups; ++which) {
    const uint64_t a = kRowsOfG | descriptor_address(shared.box(stage, which));
    const uint64_t b = kDescriptorB | descriptor_address(shared.b(at.group, 2 * J + which));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma<T, Major::kK, Major::kMN>(sums.g, a + k * kStepColumns, b + k * kStepB, J + which + k > 0);
    }
  }
  const uint64_t a = kRowsOfSum | descriptor_address(shared.box(stage, at.group));
  const uint64_t s = kDescriptorS | descriptor_address(shared.s(slot));
  const uint64_t ones = matrix_descriptor(0, 128, 128) | descriptor_address(shared.ones());
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<T, Major::kMN, Major::kMN>(sums.db[J], a + k * kStepRows16, s + k * kStepS, 1);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<T, Major::kMN, Major::kMN>(sums.dbias[J], a + k * kStepRows16, ones, 1);
  wgmma_commit();
}

// Stages J .. CH - 1 of a step. One stage's wgmmas stay in flight; then the one before is done and may be refilled.
template <typename T, int J, int RP, int CH, typename Position>
__device__ __forceinline__ void multiply_stages(Sums<RP, CH>& sums, const Layout<RP, CH>& shared, Position& ring,
                                                int slot, const Lane& at) {
  if constexpr (J < CH) {
    barrier_wait(shared.full(ring.stage), ring.parity);
    multiply_stage<T, J>(sums, shared, ring.stage, slot, at);
    if constexpr (J > 0) {
      wgmma_wait<1>();
      if (at.lane == 0) barrier_arrive(shared.empty(ring.previous()));
    }
    ring.next();
    multiply_stages<T, J + 1>(sums, shared, ring, slot, at);
  }
}

template <typename T, int RP, int CH, typename Position>
__device__ __forceinline__ void multiply_step(Sums<RP, CH>& sums, const Problem& problem,
                                              const Layout<RP, CH>& shared, Position& ring, int step,
                                              const Lane& at) {
  const int slot = step % 2;
  if (problem.db.data != nullptr) barrier_wait(shared.s_full(slot), step / 2 & 1);
  multiply_stages<T, 0>(sums, shared, ring, slot, at);
  wgmma_wait<0>();
  wgmma_settle(sums.g);
  if (at.lane == 0) {
    barrier_arrive(shared.empty(ring.previous()));
    barrier_arrive(shared.s_empty(slot));
  }
}

// ---- consumers: outputs ----

// Two neighbouring values, final or partial.
template <typename T>
__device__ __forceinline__ void store_pair(const Output& out, int part, long long at, float low, float high) {
  if (out.pitch != 0) {
    reinterpret_cast<float2*>(out.data)[(part * out.pitch + at) / 2] = make_float2(low, high);
    return;
  }
  low *= out.scale, high *= out.scale;
  if (out.fp32) {
    reinterpret_cast<float2*>(out.data)[at / 2] = make_float2(low, high);
  } else {
    reinterpret_cast<uint32_t*>(out.data)[at / 2] = pack<T>(low, high);
  }
}

// All consumers, none of the producer's warp (barrier 0 is __syncthreads).
__device__ __forceinline__ void consumers_sync() { named_barrier_sync<1, kConsumerThreads>(); }

// The exchange of g inside the cluster. Eight rows at a time have one owner: rows 8 * i of a step belong to CTA
// i * cluster / 8. Its slot holds [source][row group of the owner][unit of a warp][lane] vectors of the accumulators,
// 8 * RP values per source and row group: stores and loads of a warp are contiguous.
template <int RP>
struct Exchange {
  static constexpr int kColumns = RP / 16;                   // groups of 8 columns per warpgroup
  static constexpr int kPairs = kColumns < 2 ? 1 : 2;        // of them in one vector
  static constexpr int kVector = 2 * kPairs;                 // floats
  static constexpr int kUnits = kColumns / kPairs;           // vectors of one thread and row, per warpgroup
  static constexpr int kGroupBytes = 8 * RP * 4;

  int size, rank, groups, part;  // groups of 8 rows per owner: a power of two

  __device__ __forceinline__ explicit Exchange(int cluster)
      : size(cluster), rank(cluster_rank()), groups(8 / cluster), part(blockIdx.x / cluster) {}

  __device__ __forceinline__ uint32_t offset(int source, int group, int unit, int lane) const {
    return (source * groups + group) * kGroupBytes + (unit * 32 + lane) * kVector * 4;
  }

  // Sends this thread's values of a step to the owners of their rows.
  __device__ __forceinline__ void send(const float (&acc)[RP / 4], uint32_t slot, uint32_t barrier,
                                       const Lane& at) const {
    if (at.thread() == 0) barrier_expect(barrier, kStepRows * RP * 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int group = 2 * at.warp + h, owner = group * size / 8;
      const uint32_t remote_barrier = address_in_cta(barrier, owner);
      const uint32_t at_home = slot + offset(rank, group & (groups - 1), at.group * kUnits, at.lane);
      const uint32_t target = address_in_cta(at_home, owner);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        float values[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = acc[4 * (unit * kPairs + i / 2) + 2 * h + i % 2];
        store_async(target + unit * 32 * kVector * 4, remote_barrier, values);
      }
    }
  }

  // Adds up the parts of the rows that this CTA owns, source by source, and writes them; row is the step's first.
  template <typename T>
  __device__ __forceinline__ void finish(const Problem& problem, uint32_t slot, int row, const Lane& at) const {
    const int vectors = groups * kWarpgroups * kUnits * 32;
    for (int i = at.thread(); i < vectors; i += kConsumerThreads) {
      const int unit = i / 32 % (kWarpgroups * kUnits), group = i / 32 / (kWarpgroups * kUnits), lane = i % 32;
      float total[kVector] = {};
#pragma unroll 8
      for (int source = 0; source < size; ++source) {
        float value[kVector];
        load_shared(value, slot + offset(source, group, unit, lane));
#pragma unroll
        for (int v = 0; v < kVector; ++v) total[v] += value[v];
      }
      const int m = row + 8 * (rank * groups + group) + lane / 4;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        // unit / kUnits is the warpgroup that made it, whose half of the columns starts at RP / 2.
        const int r = unit / kUnits * (RP / 2) + 8 * (unit % kUnits * kPairs + pair) + 2 * (lane % 4);
        if (m < problem.M && r < problem.R) {
          store_pair<T>(problem.g, part, static_cast<long long>(m) * problem.R + r, total[2 * pair],
                        total[2 * pair + 1]);
        }
      }
    }
  }
};

template <typename T, int RP, int CH>
__device__ __forceinline__ void store_db(const Sums<RP, CH>& sums, const Problem& problem, const Share& share,
                                         const Lane& at) {
#pragma unroll
  for (int j = 0; j < CH; ++j) {
    const int chunk = 2 * j + at.group;
    if (chunk >= problem.chunks) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = share.column + chunk * kChunk + at.row(h);
      if (n >= problem.N) continue;
      const long long start = static_cast<long long>(n) * problem.R + at.column();
#pragma unroll
      for (int i = 0; i < RP / 8; ++i) {
        const float* values = &sums.db[j][4 * i + 2 * h];
        if (8 * i < problem.R) store_pair<T>(problem.db, blockIdx.y, start + 8 * i, values[0], values[1]);
      }
    }
  }
}

template <int RP, int CH>
__device__ __forceinline__ void store_dbias(const Sums<RP, CH>& sums, const Problem& problem, const Share& share,
                                            const Lane& at) {
  float* out = static_cast<float*>(problem.dbias.data) + blockIdx.y * problem.dbias.pitch;
#pragma unroll
  for (int j = 0; j < CH; ++j) {
    const int chunk = 2 * j + at.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = share.column + chunk * kChunk + at.row(h);
      if (chunk < problem.chunks && n < problem.N && at.lane % 4 == 0) out[n] = sums.dbias[j][2 * h];
    }
  }
}

// ---- consumers: all of it ----

// The exchange runs one step late. Two slots are enough: who sends step t has received step t - 1 from everyone, and
// everyone sent that after all its consumers (consumers_sync) had read step t - 2, the last one in this slot.
template <typename T, int RP, int CH>
__device__ __forceinline__ void consume(const Problem& problem, const Layout<RP, CH>& shared, int cluster) {
  const Lane at;
  const Share share(problem);
  const Exchange<RP> exchange(cluster);
  const bool need_g = problem.g.data != nullptr;
  Ring<Layout<RP, CH>::kStages> ring;
  Sums<RP, CH> sums;
  auto finish = [&](int step) {
    barrier_wait_cluster(shared.g_full(step % 2), step / 2 & 1);
    exchange.template finish<T>(problem, shared.g(step % 2), (share.first + step) * kStepRows, at);
  };
  if (need_g) barrier_wait(shared.b_full(), 0);
  for (int step = 0; step < share.steps; ++step) {
    multiply_step<T>(sums, problem, shared, ring, step, at);
    if (!need_g) continue;
    if (step == 0) {
      if (cluster > 1) cluster_wait();  // the other CTAs' barriers exist
    } else {
      finish(step - 1);
      consumers_sync();
    }
    exchange.send(sums.g, shared.g(step % 2), shared.g_full(step % 2), at);
  }
  let_next_kernel_start();
#pragma unroll
  for (int j = 0; j < CH; ++j) {
    wgmma_settle(sums.db[j]);
    wgmma_settle(sums.dbias[j]);
  }
  if (problem.db.data != nullptr) store_db<T>(sums, problem, share, at);
  if (problem.dbias.data != nullptr) store_dbias(sums, problem, share, at);
  // What other CTAs send arrives before this one may end.
  if (need_g) {
    finish(share.steps - 1);
  } else if (cluster > 1) {
    cluster_wait();
  }
}

template <typename T, int RP, int CH>
__device__ __forceinline__ void prepare(const Maps& maps, const Layout<RP, CH>& shared) {
  if (threadIdx.x == 0) {
    prefetch_map(&maps.dy);
    prefetch_map(&maps.b);
    prefetch_map(&maps.s);
    for (int stage = 0; stage < Layout<RP, CH>::kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), kConsumerWarps);
    }
    barrier_init(shared.b_full(), 1);
    for (int slot = 0; slot < 2; ++slot) {
      barrier_init(shared.s_full(slot), 1);
      barrier_init(shared.s_empty(slot), kConsumerWarps);
      barrier_init(shared.g_full(slot), 1);
    }
    fence_barrier_init();
  }
  if (threadIdx.x < 128) {  // 16 x 8 ones, twice
    store_shared_word(shared.ones() + 4 * threadIdx.x, kPairOfOnes<T>);
    fence_async_proxy();
  }
  __syncthreads();
}

template <typename T, int RP, int CH>
__global__ void __launch_bounds__(kThreads, 1)
    lora_dy_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Problem problem, int cluster) {
  extern __shared__ uint8_t memory[];
  const Layout<RP, CH> shared(memory);
  prepare<T>(maps, shared);
  if (cluster > 1) cluster_arrive_relaxed();  // without a cluster this would be a barrier of the CTA
  if (threadIdx.x < kConsumerThreads) {
    registers_claim<kConsumerRegisters>();
    consume<T>(problem, shared, cluster);
  } else {
    registers_give_back<kProducerRegisters>();
    if (threadIdx.x == kConsumerThreads) produce<RP, CH>(maps, problem, shared);
    __syncwarp();
    if (cluster > 1) cluster_wait();
  }
}

}  // namespace lora_dy
