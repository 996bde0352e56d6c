// Stands in for CUDA's headers where the host compiler compiles kernel source: types, built-in variables, barriers, warp
// collectives, shared memory, launch. csrc/common/device.cuh includes it; simt.cpp runs the threads.
//
// What it shows that a GPU may hide: a barrier or collective that not all threads reach (an error, with the lines where
// they wait), an access outside a buffer of simt_alloc or outside shared memory, a misaligned or otherwise undefined
// access (the build traps on UBSan's findings), shared memory read before it is written (it holds NaN), and, run in
// reverse order as well, a missing barrier. What it cannot show: races inside a warp, memory ordering, speed. A thread that
// spins until another one writes hangs it: threads change places at barriers and collectives alone.
//
// What is missing here and a kernel needs, belongs here: everything that the lanes of a warp do together is one
// warp_collective, as __shfl_sync below and mma_host.h are.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include "float16.h"

#ifdef __FAST_MATH__
#error "kernels rely on IEEE arithmetic in the order written"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// ---- types ----

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- the engine ----

namespace simt {

using Where = std::source_location;

// Ends the launch with this text, naming thread and block. Never returns to the kernel.
[[noreturn]] void fail(const char* format, ...);
void barrier(const Where& where);
int lane();

// Waits until every lane of the mask calls from the same place; then the last one runs `together` on what they all
// passed (null for lanes outside the mask), and all go on.
using Together = void (*)(void* const (&arguments)[32], unsigned mask);
void warp_collective(unsigned mask, void* argument, Together together, const Where& where);

void* shared_object(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
cudaError_t run(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& thread);

template <typename T>
struct Exchange {
  T value;
  int source;
  T result;

  static void together(void* const (&arguments)[32], unsigned mask) {
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0) continue;
      auto* own = static_cast<Exchange*>(arguments[i]);
      auto* other = static_cast<Exchange*>(arguments[own->source]);
      if (other == nullptr) fail("lane %d shuffles from lane %d, which is not in the mask %08x", i, own->source, mask);
      own->result = other->value;
    }
  }
};

template <typename T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  Exchange<T> exchange{value, source, value};
  warp_collective(mask, &exchange, Exchange<T>::together, where);
  return exchange.result;
}

inline int segment_end(int width) { return lane() | (width - 1); }

}  // namespace simt

// ---- what a kernel calls ----

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::warp_collective(mask, nullptr, [](void* const (&)[32], unsigned) {}, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  return simt::shuffle(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)), where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() ^ bits;
  return simt::shuffle(mask, value, source > simt::segment_end(width) ? simt::lane() : source, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() + static_cast<int>(delta);
  return simt::shuffle(mask, value, source > simt::segment_end(width) ? simt::lane() : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  struct Vote {
    int predicate;
    unsigned ballot;
  } vote{predicate, 0};
  const auto count = [](void* const (&votes)[32], unsigned voters) {
    unsigned ballot = 0;
    for (int i = 0; i < 32; ++i)
      if (voters >> i & 1) ballot |= unsigned{static_cast<Vote*>(votes[i])->predicate != 0} << i;
    for (int i = 0; i < 32; ++i)
      if (voters >> i & 1) static_cast<Vote*>(votes[i])->ballot = ballot;
  };
  simt::warp_collective(mask, &vote, count, where);
  return vote.ballot;
}

// Loads and stores, by any cache policy. Unlike a plain *p these say what is wrong with a misaligned address.
template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) simt::fail("load of %zu bytes from %p", sizeof(T), p);
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return __ldg(p);
}

template <typename T>
void __stwb(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) simt::fail("store of %zu bytes to %p", sizeof(T), p);
  *p = value;
}
template <typename T>
void __stcs(T* p, T value) {
  __stwb(p, value);
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }

// ---- csrc/common/device.cuh's own names ----

namespace peft_kernels {

template <typename T>
T& shared() {
  static char key;
  return *static_cast<T*>(simt::shared_object(&key, sizeof(T), alignof(T)));
}

inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(simt::dynamic_shared()); }

inline float exp2_approx(float x) {
  const float result = std::exp2(x);
  return result < FLT_MIN ? 0.0f : result;
}
inline float reciprocal_approx(float x) { return 1.0f / x; }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t,
                   Arguments... arguments) {
  return simt::run(grid, block, dynamic_bytes, [&] { kernel(arguments...); });
}

}  // namespace peft_kernels
