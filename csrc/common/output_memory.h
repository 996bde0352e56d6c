// What a CPU kernel does about the memory of a large output.
//
// Past the caches: a plain store reads its line first; one past the caches does not, and what nobody reads soon takes no place
// there. Measured on two cores of a Zen 5 (32 MB of L3), LayerNorm's backward into memory that was used before: 0.77 of the
// time. But a page that the kernel gives out at its first write is in the cache already, as zeros: there a store past it costs
// 1.1 times the time. glibc's malloc, and Torch's allocator with it, gets such pages for every block of 32 MB and more.
//
// Huge pages: a page's first write is a fault, and 8,192 of them take longer than filling 32 MB; in pages of 2 MB there are 16.
#pragma once

#include <cstdint>

namespace peft_kernels {

// 16 MB and more in memory that was written before. row_bytes: rows must fill whole lines, as part of one would be written
// by itself. Takes some microseconds.
bool goes_past_cache(const void* out, int64_t rows, int64_t row_bytes);

// Asks the system to give 4 MB and more of memory that was never written in huge pages, where it does not anyway; only those
// that lie inside it whole, so that the output takes no more. Returns whether it was asked.
bool ask_for_huge_pages(void* out, int64_t bytes);

}  // namespace peft_kernels
