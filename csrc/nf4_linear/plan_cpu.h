// Which way a product over a 4-bit weight is made on a CPU.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Up to so many rows of x W is decoded on the way, for every group of them; from there on once for all.
constexpr int64_t kPackedRowsDot = 24, kPackedRowsFma = 16;

}  // namespace peft_kernels
