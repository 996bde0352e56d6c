// LayerNorm and RMSNorm on a CPU: raw pointers, sizes and strides, no Torch.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace peft_kernels {

// Element (m, k) is data[m * row + k * col]; data is null where the matrix is not there.
struct Strided {
  const void* data = nullptr;
  int64_t row = 0, col = 1;
};

struct NormFwd {
  Dtype dtype, out_dtype;  // of x, residual and total (f32, bf16 or f16); of y (that, or f32)
  int64_t M, K;
  Strided x, residual;
  const float *weight, *bias;  // [K]
  double eps;
  bool rms;
  void* y;               // out [M, K]
  void* total;           // out [M, K] if there is a residual: x + residual, rounded
  float *mean, *rstd;    // out [M]; no mean if rms
  int threads;           // the result does not depend on it
};

struct NormBwd {
  Dtype dtype, dy_dtype, out_dtype;  // of x, dtotal and dx; of dy (that, or f32); of dweight and dbias
  int64_t M, K;
  Strided dy, dtotal, x;       // no dtotal: nothing comes to the total from elsewhere
  const float *mean, *rstd;    // [M]; no mean if rms
  const float* weight;         // [K]
  bool rms;
  void *dx, *dweight, *dbias;  // out [M, K], [K], [K]; null where not needed. One of the first two is.
  int threads;                 // the result does not depend on it
};

struct NormKernels {
  void (*forward)(const NormFwd&);
  void (*backward)(const NormBwd&);
};

// The kernels compiled for the instruction set in use.
const NormKernels& norm_kernels();

}  // namespace peft_kernels
