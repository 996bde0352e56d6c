// The low-rank half of the LoRA linear on a CPU: raw pointers, sizes and strides, no Torch.
// The base products x @ weight.T and dy @ weight stay with the BLAS; they are added to what is written here.
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/rows.h"

namespace peft_kernels {

struct LoraForward {
  Dtype dtype;                   // of x, a, b, y and s
  int64_t M, N, K, R;
  Rows x, a, b;                  // x [M, K], a [R, K], b [N, R]
  const void* bias = nullptr;    // [N], fp32 (fp64 for f64), or null
  double scaling = 1.0;
  void* y = nullptr;             // out [M, N]: scaling * s @ b.T + bias
  void* s = nullptr;             // out [M, R]: drop(x) @ a.T
  uint8_t* mask = nullptr;       // out [M, ceil(K / 8)]; null means no dropout
  uint64_t seed = 0;
  int64_t threshold = 0;         // of 2^16 levels
  int threads = 1;
};

struct LoraBackward {
  Dtype dtype;                   // of dy, x, a, b, s and dx
  int64_t M, N, K, R;
  Rows dy, x, a, b, s;           // dy [M, N]; x is read only for da, s only for db
  const uint8_t* mask = nullptr; // [M, ceil(K / 8)] or null
  double scaling = 1.0;
  void* dx = nullptr;            // out [M, K]: scaling * drop(g @ a); null: not asked, as for the others
  void* da = nullptr;            // out [R, K] of da_dtype
  void* db = nullptr;            // out [N, R] of db_dtype
  void* dbias = nullptr;         // out [N], fp32 (fp64 for f64)
  Dtype da_dtype, db_dtype;
  int threads = 1;
};

struct LoraKernels {
  void (*forward)(const LoraForward&);
  void (*backward)(const LoraBackward&);
};

// The kernels compiled for the instruction set in use.
const LoraKernels& lora_kernels();

}  // namespace peft_kernels
