#include "output_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace peft_kernels {

namespace {

constexpr int64_t kCacheKeeps = 16 << 20, kManyPages = 4 << 20;

// Whether a page of an output has never been touched: of four of those that lie in it whole, the first and the last among them.
bool is_fresh([[maybe_unused]] const void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out), first = (begin + page - 1) / page, end = (begin + bytes) / page;
  for (uintptr_t i = 0; i < 4 && first < end; ++i) {
    unsigned char resident = 1;
    const uintptr_t at = first + (end - 1 - first) * i / 3;
    if (mincore(reinterpret_cast<void*>(at * page), 1, &resident) == 0 && (resident & 1) == 0) return true;
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
