// Thin wrappers around the Hopper PTX of the dy pass. Names in brackets are sections of the PTX ISA manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace lora_dy {

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

// Returns once the phase with this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// The same for data that other CTAs of the cluster wrote.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// ---- clusters [barrier.cluster, mapa, st.async] ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster arrives once and waits once. Relaxed: fence_barrier_init has published the barriers, and
// a release would cost a fence of the whole GPU's memory before the first load.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The address of the same shared memory in another CTA of the cluster.
__device__ __forceinline__ uint32_t address_at(uint32_t address, uint32_t cta) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(cta));
  return remote;
}

// Writes into another CTA's shared memory and counts the bytes on the barrier there.
__device__ __forceinline__ void store_remote(uint32_t target, uint32_t barrier, const float (&v)[2]) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(target),
               "f"(v[0]), "f"(v[1]), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_remote(uint32_t target, uint32_t barrier, const float (&v)[4]) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void load_shared(float (&v)[2], uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_shared(float (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}

// ---- TMA [Data Movement and Conversion Instructions: cp.async.bulk.tensor] ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box with its corner at column x and row y. What lies outside the tensor arrives as zeros and counts its bytes.
__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap* map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          target),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// Orders ordinary shared memory writes before the async proxy's (wgmma's) reads [fence.proxy.async].
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- programmatic dependent launch [griddepcontrol] ----

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Returns when the kernel before this one has ended and its writes can be read.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- 16-bit types ----

template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr uint32_t kOnes = 0x3f803f80u;  // two of them
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
};

template <>
struct Half<__half> {
  static constexpr uint32_t kOnes = 0x3c003c00u;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
};

// ---- wgmma [Asynchronous Warpgroup Level Matrix Instructions] ----

template <int COUNT>
__device__ __forceinline__ void registers_give_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_claim() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Before the first wgmma, and again after any ordinary access to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After a wait for all wgmmas: keeps the compiler from reading the accumulator before that wait.
template <int COUNT>
__device__ __forceinline__ void settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// How an operand with rows of `kWidth` 16-bit values lies in shared memory: TMA boxes of that width, swizzled by their
// row's bytes (16: not at all). Wider operands are several boxes side by side, box_rows rows each.
template <int COLUMNS>
struct Rows {
  static constexpr int kWidth = COLUMNS < 64 ? COLUMNS : 64;
  static constexpr int kBytes = 2 * kWidth;
  static_assert(kBytes == 16 || kBytes == 32 || kBytes == 64 || kBytes == 128, "one of the swizzles");
  static constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : kBytes == 64 ? 2 : kBytes == 32 ? 3 : 0;
};

// Matrix descriptor [Matrix Descriptor Format]: address, leading and stride offsets in 16-byte units, the swizzle.
constexpr __host__ __device__ uint64_t matrix_descriptor(uint64_t swizzle, uint32_t leading_bytes,
                                                         uint32_t stride_bytes) {
  return (swizzle << 62) | (static_cast<uint64_t>(stride_bytes >> 4) << 32) |
         (static_cast<uint64_t>(leading_bytes >> 4) << 16);
}

// An operand whose rows are the summed index k (MN-major). The stride offset leads to the next 8 k; the leading one to
// the next box of 64 columns. Without a swizzle the two change roles, so where there is one box both say 8 k.
template <int COLUMNS>
constexpr __host__ __device__ uint64_t k_rows_descriptor(uint32_t box_rows) {
  constexpr uint32_t kNext = 8 * Rows<COLUMNS>::kBytes;
  return matrix_descriptor(Rows<COLUMNS>::kSwizzle, COLUMNS > 64 ? box_rows * 128 : kNext, kNext);
}

// The address field has 14 bits. In a cluster a shared address carries the CTA's rank above bit 23: cut it off.
__device__ __forceinline__ uint64_t descriptor_address(uint32_t address) { return (address & 0x3ffffu) >> 4; }

#define LORA_ACC4(d, i) "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define LORA_ACC8(d, i) LORA_ACC4(d, i), LORA_ACC4(d, (i) + 4)
#define LORA_ACC16(d, i) LORA_ACC8(d, i), LORA_ACC8(d, (i) + 8)
#define LORA_ACC32(d, i) LORA_ACC16(d, i), LORA_ACC16(d, (i) + 16)
#define LORA_ACC64(d, i) LORA_ACC32(d, i), LORA_ACC32(d, (i) + 32)

#define LORA_WGMMA(N, TYPE, A, B, KEEP, TRANSPOSE_A)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" KEEP ", 0;\n"                           \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LORA_REGISTERS \
               "}, %" A ", %" B ", p, 1, 1, %" TRANSPOSE_A ", 1;\n}" LORA_OPERANDS)

// d [64, 2 * COUNT] = (keep ? d : 0) + a [64, 16] @ b [16, 2 * COUNT]. Rows of b are k; rows of a too if A_MN_MAJOR,
// else columns. One overload per width.
template <typename T, int A_MN_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[4], uint64_t a, uint64_t b, int keep) {
#define LORA_REGISTERS \
      "%0, %1, %2, %3"
#define LORA_OPERANDS : LORA_ACC4(d, 0) : "l"(a), "l"(b), "r"(keep), "n"(A_MN_MAJOR)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    LORA_WGMMA("8", "bf16", "4", "5", "6", "7");
  } else {
    LORA_WGMMA("8", "f16", "4", "5", "6", "7");
  }
#undef LORA_REGISTERS
#undef LORA_OPERANDS
}

template <typename T, int A_MN_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[8], uint64_t a, uint64_t b, int keep) {
#define LORA_REGISTERS \
      "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORA_OPERANDS : LORA_ACC8(d, 0) : "l"(a), "l"(b), "r"(keep), "n"(A_MN_MAJOR)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    LORA_WGMMA("16", "bf16", "8", "9", "10", "11");
  } else {
    LORA_WGMMA("16", "f16", "8", "9", "10", "11");
  }
#undef LORA_REGISTERS
#undef LORA_OPERANDS
}

template <typename T, int A_MN_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, int keep) {
#define LORA_REGISTERS \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LORA_OPERANDS : LORA_ACC16(d, 0) : "l"(a), "l"(b), "r"(keep), "n"(A_MN_MAJOR)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    LORA_WGMMA("32", "bf16", "16", "17", "18", "19");
  } else {
    LORA_WGMMA("32", "f16", "16", "17", "18", "19");
  }
#undef LORA_REGISTERS
#undef LORA_OPERANDS
}

template <typename T, int A_MN_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int keep) {
#define LORA_REGISTERS \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LORA_OPERANDS : LORA_ACC32(d, 0) : "l"(a), "l"(b), "r"(keep), "n"(A_MN_MAJOR)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    LORA_WGMMA("64", "bf16", "32", "33", "34", "35");
  } else {
    LORA_WGMMA("64", "f16", "32", "33", "34", "35");
  }
#undef LORA_REGISTERS
#undef LORA_OPERANDS
}

template <typename T, int A_MN_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int keep) {
#define LORA_REGISTERS \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LORA_OPERANDS : LORA_ACC64(d, 0) : "l"(a), "l"(b), "r"(keep), "n"(A_MN_MAJOR)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    LORA_WGMMA("128", "bf16", "64", "65", "66", "67");
  } else {
    LORA_WGMMA("128", "f16", "64", "65", "66", "67");
  }
#undef LORA_REGISTERS
#undef LORA_OPERANDS
}

#undef LORA_WGMMA

}  // namespace lora_dy
