// wgmma on Hopper: descriptors of operands in shared memory, and the instruction, one overload per width. Names in
// brackets are sections of the PTX ISA manual [Asynchronous Warpgroup Level Matrix Instructions].
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace peft_kernels {
namespace sm90 {

// Before the first wgmma, and again after any ordinary access to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups run.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After wgmma_wait<0>: keeps the compiler from reading the accumulator before that wait.
template <int COUNT>
__device__ __forceinline__ void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- operands [Matrix Descriptor Format] ----

// How an operand with rows of COLUMNS 16-bit values lies in shared memory: TMA boxes of kWidth columns, swizzled by
// their row's bytes (16: not at all), as make_map in sm90_host.h has it. Wider operands are boxes side by side.
template <int COLUMNS>
struct OperandRows {
  static constexpr int kWidth = COLUMNS < 64 ? COLUMNS : 64;
  static constexpr int kBytes = 2 * kWidth;
  static_assert(kBytes == 16 || kBytes == 32 || kBytes == 64 || kBytes == 128, "one of the swizzles");
  static constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : kBytes == 64 ? 2 : kBytes == 32 ? 3 : 0;
};

// Leading and stride offsets in units of 16 bytes, the swizzle as above; descriptor_address is still to be added. The
// 128-byte swizzle's atom is 8 rows of 128 bytes, so that such tiles start at multiples of 1024.
//   K-major: a row is 64 k of one m or n; the stride offset leads to the next 8 rows; no leading offset.
//   MN-major: a row is 64 m or n of one k; the stride offset leads to the next 8 k, the leading one to the next 64.
constexpr __host__ __device__ uint64_t matrix_descriptor(uint64_t swizzle, uint32_t leading_bytes,
                                                         uint32_t stride_bytes) {
  return (swizzle << 62) | (static_cast<uint64_t>(stride_bytes >> 4) << 32) |
         (static_cast<uint64_t>(leading_bytes >> 4) << 16);
}

// An MN-major operand of COLUMNS m or n, in boxes of box_rows rows. Without a swizzle the two offsets change roles, so
// where there is one box both say 8 k.
template <int COLUMNS>
constexpr __host__ __device__ uint64_t k_rows_descriptor(uint32_t box_rows) {
  constexpr uint32_t kNext = 8 * OperandRows<COLUMNS>::kBytes;
  return matrix_descriptor(OperandRows<COLUMNS>::kSwizzle, COLUMNS > 64 ? box_rows * 128 : kNext, kNext);
}

// The address field has 14 bits. In a cluster a shared address carries the CTA's rank above bit 23: cut it off.
__device__ __forceinline__ uint64_t descriptor_address(uint32_t address) { return (address & 0x3ffffu) >> 4; }

// ---- the instruction ----

// Which index of an operand its rows in shared memory run along.
enum class Major : int { kK = 0, kMN = 1 };

#define SM90_D4(i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SM90_D8(i) SM90_D4(i), SM90_D4((i) + 4)
#define SM90_D16(i) SM90_D8(i), SM90_D8((i) + 8)
#define SM90_D32(i) SM90_D16(i), SM90_D16((i) + 16)
#define SM90_D64(i) SM90_D32(i), SM90_D32((i) + 32)
#define SM90_D128(i) SM90_D64(i), SM90_D64((i) + 64)

#define SM90_R4 "%0, %1, %2, %3"
#define SM90_R8 SM90_R4 ", %4, %5, %6, %7"
#define SM90_R16 SM90_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SM90_R32 \
  SM90_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SM90_R64                                                                              \
  SM90_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
           ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SM90_R128                                                                                         \
  SM90_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
           ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
           ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
           ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define SM90_WGMMA(COUNT, N, TYPE, OP_A, OP_B, OP_KEEP, OP_A_MAJOR, OP_B_MAJOR)                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #OP_KEEP ", 0;\n"                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SM90_R##COUNT \
               "}, %" #OP_A ", %" #OP_B ", p, 1, 1, %" #OP_A_MAJOR ", %" #OP_B_MAJOR ";\n}"       \
               : SM90_D##COUNT(0)                                                                 \
               : "l"(a), "l"(b), "r"(keep), "n"(static_cast<int>(A_MAJOR)), "n"(static_cast<int>(B_MAJOR)))

// The last five are the asm statement's numbers of a, b, keep and the two majors, which follow the accumulator's.
#define SM90_WGMMA_OVERLOAD(COUNT, N, ...)                                                     \
  template <typename T, Major A_MAJOR, Major B_MAJOR>                                          \
  __device__ __forceinline__ void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, int keep) { \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                          \
      SM90_WGMMA(COUNT, N, "bf16", __VA_ARGS__);                                               \
    } else {                                                                                   \
      SM90_WGMMA(COUNT, N, "f16", __VA_ARGS__);                                                \
    }                                                                                          \
  }

// d [64, 2 * COUNT] = (keep ? d : 0) + a [64, 16] @ b [16, 2 * COUNT], with COUNT registers of d in each thread. a and b
// are descriptors: matrix_descriptor | descriptor_address. It runs on after it returns.
SM90_WGMMA_OVERLOAD(4, 8, 4, 5, 6, 7, 8)
SM90_WGMMA_OVERLOAD(8, 16, 8, 9, 10, 11, 12)
SM90_WGMMA_OVERLOAD(16, 32, 16, 17, 18, 19, 20)
SM90_WGMMA_OVERLOAD(32, 64, 32, 33, 34, 35, 36)
SM90_WGMMA_OVERLOAD(64, 128, 64, 65, 66, 67, 68)
SM90_WGMMA_OVERLOAD(128, 256, 128, 129, 130, 131, 132)

// wgmma_wait<0> and wgmma_settle in one instruction: naming the accumulator keeps the compiler from reading it earlier.
__device__ __forceinline__ void wgmma_finish(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : SM90_D128(0)::"memory");
}

#undef SM90_WGMMA_OVERLOAD
#undef SM90_WGMMA
#undef SM90_R4
#undef SM90_R8
#undef SM90_R16
#undef SM90_R32
#undef SM90_R64
#undef SM90_R128
#undef SM90_D4
#undef SM90_D8
#undef SM90_D16
#undef SM90_D32
#undef SM90_D64
#undef SM90_D128

}  // namespace sm90
}  // namespace peft_kernels
