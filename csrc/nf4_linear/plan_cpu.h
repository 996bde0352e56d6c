// Which way a product over a 4-bit weight is made on a CPU.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Up to so many rows of x, those of one tile with 512-bit registers, W is decoded while it is multiplied; from there on first.
// Measured at N = K = 4096 on two cores (Zen 4) against decoding first: 0.80 of the time at 8 rows in bf16 and 0.78 in fp32, 0.92
// and 0.95 at 12.
constexpr int kTallTile = 12;

// Packed x of up to so many bytes streams past strips of one tile; more of it is read once for a whole stripe. In bf16 the
// former is 6 % faster at 32 rows and 5 % at 96, in fp32 5 % slower at 64, where x alone fills the second cache.
constexpr int64_t kShortStripBytes = int64_t{768} << 10;

// Up to so many rows of x each thread reads several streams of W at once. Measured on the same cores with W from memory, in bf16:
// 0.8 of the time of one stream at one row and 0.85 at two; from three rows on, products take longer than the bytes.
constexpr int64_t kGemvRows = 2;

// Up to so many rows of dy the backward decodes W in registers, for every 4 to 8 of them; from there on into packed panels.
// Measured at N = K = 4096 on two cores (Zen 5): level at 40 rows in bf16, and at 64 in fp32.
constexpr int64_t kFewRowsDot = 32, kFewRowsFma = 48;

}  // namespace peft_kernels
