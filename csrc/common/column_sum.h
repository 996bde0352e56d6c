// The sums of a matrix's columns on a CPU, for any primitive: raw pointers, sizes and strides, no Torch.
#pragma once

#include <cstdint>

#include "rows.h"

namespace peft_kernels {

struct ColumnSum {
  Dtype dtype, out_dtype;        // of `matrix` (f32, bf16 or f16) and of `sums`
  const void* matrix = nullptr;  // element (m, n) is matrix[m * row + n * col]
  int64_t M, N, row, col;        // M and N at least 1
  void* sums = nullptr;          // out [N]: the sum over m
  int threads = 1;               // the result does not depend on it
};

struct ColumnSumKernels {
  void (*run)(const ColumnSum&);
};

// The kernels compiled for the instruction set in use.
const ColumnSumKernels& column_sum_kernels();

}  // namespace peft_kernels
