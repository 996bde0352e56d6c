// Thin wrappers around the PTX of the Hopper kernels; wgmma is in sm90_wgmma.cuh. Names in brackets are sections of the
// PTX ISA manual. Addresses of type uint32_t are shared memory's, as smem_address gives them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace peft_kernels {
namespace sm90 {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers [Parallel Synchronization and Communication Instructions: mbarrier] ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the inits visible to the async proxy and to the other CTAs of the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ bool barrier_try_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Returns once the phase with this parity has completed. For data of this CTA's threads or of TMA: it acquires in the
// CTA's scope.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_try(barrier, parity)) {
  }
}

// The same for data that other CTAs of the cluster wrote: it acquires in the cluster's scope.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  while (!barrier_try_cluster(barrier, parity)) {
  }
}

// Barrier ID (0 is __syncthreads) of THREADS threads, whole warps [bar].
template <int ID, int THREADS>
__device__ __forceinline__ void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// ---- TMA [Data Movement and Conversion Instructions: cp.async.bulk.tensor] ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies a box of the map's matrix, its first element at column x and row y, to shared memory; its bytes are counted
// off the barrier. What lies outside the matrix arrives as zeros and counts too.
__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap* map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          target),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t source, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source),
               "r"(x), "r"(y)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Orders ordinary shared memory writes before the async proxy's reads: a TMA store's, wgmma's [fence.proxy.async].
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// ---- this CTA's shared memory [ld, st] ----

__device__ __forceinline__ uint32_t load_shared_word(uint32_t source) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(source) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_word(uint32_t target, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(value) : "memory");
}

__device__ __forceinline__ void load_shared(float (&v)[2], uint32_t source) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(source) : "memory");
}

__device__ __forceinline__ void load_shared(float (&v)[4], uint32_t source) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(source)
               : "memory");
}

// ---- clusters [barrier.cluster, mapa, st.async] ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// For all threads of all CTAs of the cluster; orders their accesses to each other's shared memory.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The two halves of a cluster_sync that publishes nothing: every thread of the cluster arrives once and waits once.
// Relaxed is enough after fence_barrier_init, which has published the barriers; a release would cost a fence of the
// whole GPU's memory before the first load.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The address of the same shared memory in another CTA of the cluster.
__device__ __forceinline__ uint32_t address_in_cta(uint32_t address, uint32_t cta) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(cta));
  return remote;
}

// Four floats at this CTA's shared address, but in the shared memory of another CTA of the cluster.
__device__ __forceinline__ float4 load_from_cta(uint32_t source, uint32_t cta) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(source), "r"(cta)
      : "memory");
  return v;
}

// Writes into another CTA's shared memory and counts the bytes on the barrier there. An illegal instruction outside a
// cluster.
__device__ __forceinline__ void store_async(uint32_t target, uint32_t barrier, const float (&v)[2]) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(target),
               "f"(v[0]), "f"(v[1]), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(uint32_t target, uint32_t barrier, const float (&v)[4]) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

// ---- programmatic dependent launch [griddepcontrol] ----

// Returns when the kernels before this one are complete and their writes visible; at once in an ordinary launch.
__device__ __forceinline__ void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel's CTAs take their places as this one's leave room. It still waits for this one's end, as above.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- registers [setmaxnreg] ----

// For every warp of a warpgroup: its threads have COUNT registers from here on.
template <int COUNT>
__device__ __forceinline__ void registers_give_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_claim() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- fragments [ldmatrix, stmatrix, mma.m16n8k16] ----

// 8x8 matrices of 16-bit values; lanes 8i .. 8i + 7 give the row addresses of matrix i. Plain: lane l receives row
// l / 4, columns 2 (l % 4) and the next. Transposed: rows 2 (l % 4) and the next of column l / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_4_matrices(uint32_t (&v)[4], uint32_t row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
  }
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_2_matrices(uint32_t& v0, uint32_t& v1, uint32_t row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(v0), "=r"(v1)
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(v0), "=r"(v1) : "r"(row) : "memory");
  }
}

// The way back of a plain load_4_matrices.
__device__ __forceinline__ void store_4_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// d [16, 8] += a [16, 16] @ b [16, 8]. With q = lane / 4, p = 2 (lane % 4), lane holds
//   a[i]: row q + 8 (i % 2), columns p + 8 (i / 2) and the next
//   b0, b1: rows p (+ 8 for b1) and the next, column q
//   d[2 h + e]: row q + 8 h, column p + e
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- pairs of 16-bit values in a register ----

// Rounds two floats into one register of two T.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

template <typename T>
constexpr uint32_t kPairOfOnes = std::is_same_v<T, __nv_bfloat16> ? 0x3f803f80u : 0x3c003c00u;

// All ones in the low 16 bits if the top bit of byte BYTE of `low` is set, in the high 16 bits by the same byte of
// `high` [prmt: bit 3 of a selector nibble spreads the byte's sign].
template <int BYTE>
__device__ __forceinline__ uint32_t spread_signs(uint32_t low, uint32_t high) {
  constexpr uint32_t kSelector = (8 + BYTE) * 0x11 + (12 + BYTE) * 0x1100;
  uint32_t pair;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(low), "r"(high), "n"(kSelector));
  return pair;
}

// One 32 x 32 -> 64-bit multiply. Written as uint64_t arithmetic, ptxas adds a zero to every high word.
__device__ __forceinline__ void multiply_wide(uint32_t& high, uint32_t& low, uint32_t a, uint32_t b) {
  asm("{\n.reg .b64 product;\nmul.wide.u32 product, %2, %3;\nmov.b64 {%0, %1}, product;\n}"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
}

}  // namespace sm90
}  // namespace peft_kernels
