// How a matrix in memory is named to a CPU kernel.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class Dtype : int { f32, f64, bf16, f16 };

// Row-major with unit column stride; `row` is the distance between rows in elements (0 repeats one row).
struct Rows {
  const void* data = nullptr;
  int64_t row = 0;
};

}  // namespace peft_kernels
