// Which outputs a kernel writes past the caches. Compiled once per instruction set.
//
// A plain store reads its line first; one past the caches does not, and what nobody reads soon takes no place there.
// Measured on two cores of a Zen 5 (32 MB of L3), a norm's backward in memory that is used again: 0.77 of the time at 25 MB.
// But memory that comes fresh from the kernel is in the cache already, as the zeros that the kernel has just written: there
// a store past it costs 1.1 times the time at 134 MB. glibc's malloc, and Torch's allocator with it, asks the kernel anew
// for every block from 32 MB on (DEFAULT_MMAP_THRESHOLD_MAX).
#pragma once

#include "simd_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kCacheKeeps = 16 << 20, kAlwaysFresh = 32 << 20;  // bytes of an output

// Rows must fill whole lines: part of one would be written by itself.
static inline bool goes_past_cache(const void* out, int64_t rows, int64_t row_bytes) {
  const int64_t bytes = rows * row_bytes;
  return bytes >= kCacheKeeps && bytes < kAlwaysFresh && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// What went past the caches is seen by other threads after this.
static inline void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace PK_ISA
}  // namespace peft_kernels
