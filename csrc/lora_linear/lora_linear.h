// The LoRA linear on a CPU: raw pointers, sizes and strides, no Torch.
// Without a weight only the low-rank half is written; the BLAS then adds the base product x @ weight.T or dy @ weight.
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/rows.h"

namespace peft_kernels {

// weight [N, K]: element (n, k) is data[n * line + k], or data[k * line + n] if transposed; null leaves its product out.
struct Weight {
  const void* data = nullptr;
  int64_t line = 0;
  bool transposed = false;
};

// A few rows read each adapter once and in its own dtype; more rows pack it, in the dtype of x.
constexpr int64_t kFewRows = 4;
inline bool few_rows(int64_t M, bool masked) { return M > 0 && M <= kFewRows && !masked; }

struct LoraForward {
  Dtype dtype;                   // of x, weight, y and s
  Dtype a_dtype, b_dtype;        // of a and b: as x, except for few rows
  int64_t M, N, K, R;
  Rows x, a, b;                  // x [M, K], a [R, K] and b [N, R], dense
  Weight weight;
  const void* bias = nullptr;    // [N], fp32 (fp64 for f64), or null
  double scaling = 1.0;
  void* y = nullptr;             // out [M, N]: scaling * s @ b.T + x @ weight.T + bias
  void* s = nullptr;             // out [M, R]: drop(x) @ a.T
  uint8_t* mask = nullptr;       // out [M, ceil(K / 8)]; null means no dropout
  uint64_t seed = 0;
  int64_t threshold = 0;         // of 2^16 levels
  int threads = 1;
};

struct LoraBackward {
  Dtype dtype;                   // of dy, x, weight, s and dx
  Dtype a_dtype, b_dtype;        // of a and b: as dy, except for few rows
  int64_t M, N, K, R;
  Rows dy, x, a, b, s;           // dy [M, N]; x is read only for da, s only for db
  Weight weight;
  const uint8_t* mask = nullptr; // [M, ceil(K / 8)] or null
  double scaling = 1.0;
  void* dx = nullptr;            // out [M, K]: scaling * drop(g @ a) + dy @ weight; null: not asked, as for the others
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
