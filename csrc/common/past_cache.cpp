#include "past_cache.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace peft_kernels {

namespace {

constexpr int64_t kCacheKeeps = 16 << 20;

// Whether the page in the middle of an output has never been touched.
bool is_fresh([[maybe_unused]] const void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLargestPage = 64 << 10;
  unsigned char resident = 1;
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(out) + bytes / 2) / kLargestPage * kLargestPage;
  return mincore(reinterpret_cast<void*>(middle), 1, &resident) == 0 && (resident & 1) == 0;
#else
  return false;
#endif
}

}  // namespace

bool goes_past_cache(const void* out, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kCacheKeeps && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
         !is_fresh(out, rows * row_bytes);
}

}  // namespace peft_kernels
