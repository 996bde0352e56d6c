// Which way a product over a 4-bit weight is made on a CPU.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Up to so many rows of x W is decoded on the way, for every group of them; from there on once for all, which costs as much as
// the products of about 20 rows in bf16. Measured at N = K = 4096 on two cores (Zen 5): level at 24 to 30 rows in bf16, and at
// 40 to 60 in fp32, whose products take twice as long and whose decoded rows fill twice the cache.
constexpr int64_t kPackedRowsDot = 24, kPackedRowsFma = 48;

}  // namespace peft_kernels
