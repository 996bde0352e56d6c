// The linear layer over a 4-bit weight on a CPU: raw pointers, sizes and strides, no Torch.
#pragma once

#include <cstdint>

#include "../common/nf4.h"
#include "../common/rows.h"

namespace peft_kernels {

// Products are made in the dtype of `left`, whatever the weight was quantised from: W [N, K] rounded to bf16 where the CPU
// multiplies bf16, its fp32 values for every other 16-bit case. Sums are fp32 (fp64 for f64) and rounded once. With `by_bf16`
// left and W of an fp32 product are rounded to bf16 too, where the CPU multiplies that.
struct Nf4Linear {
  Dtype dtype;                 // of left, addend and out
  int64_t M, N, K;             // M > 0; N > 0 forward, K > 0 backward
  Rows left;                   // forward: x [M, K]; backward: dy [M, N]
  Nf4Weight weight;
  const void* bias = nullptr;  // forward: [N] fp32 (fp64 for f64), or null
  Rows addend;                 // of out's shape, or null
  void* out = nullptr;         // forward: y [M, N] = x @ W.T + bias + addend; backward: dx [M, K] = dy @ W + addend
  int threads = 1;
  bool by_bf16 = false;
};

struct Nf4LinearKernels {
  void (*forward)(const Nf4Linear&);
  void (*backward)(const Nf4Linear&);
};

}  // namespace peft_kernels
