#include "output_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace peft_kernels {

namespace {

constexpr int64_t kCacheKeeps = 16 << 20, kManyPages = 4 << 20;

// Whether a page of an output has never been touched: of four of them, the first and the last one among them.
bool is_fresh([[maybe_unused]] const void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLargestPage = 64 << 10;
  for (int64_t i = 0; i < 4; ++i) {
    unsigned char resident = 1;
    const uintptr_t at = (reinterpret_cast<uintptr_t>(out) + (bytes - 1) / 3 * i) / kLargestPage * kLargestPage;
    if (mincore(reinterpret_cast<void*>(at), 1, &resident) == 0 && (resident & 1) == 0) return true;
  }
#endif
  return false;
}

}  // namespace

bool goes_past_cache(const void* out, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kCacheKeeps && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
         !is_fresh(out, rows * row_bytes);
}

bool ask_for_huge_pages([[maybe_unused]] void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (bytes < kManyPages || !is_fresh(out, bytes)) return false;
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + bytes) / kHugePage * kHugePage;
  return madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace peft_kernels
