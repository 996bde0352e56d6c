// The bias gradient on a CPU: raw pointers, sizes and strides, no Torch.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace peft_kernels {

struct BiasGrad {
  Dtype dtype, out_dtype;   // of dy (f32, bf16 or f16) and of dbias
  const void* dy = nullptr; // element (m, n) is dy[m * row + n * col]
  int64_t M, N, row, col;
  void* dbias = nullptr;    // out [N]: the sum over m
  int threads = 1;          // the result does not depend on it
};

struct BiasGradKernels {
  void (*run)(const BiasGrad&);
};

// The kernels compiled for the instruction set in use.
const BiasGradKernels& bias_grad_kernels();

}  // namespace peft_kernels
