// The activation pass on a CPU: raw pointers, sizes and strides, no Torch.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace peft_kernels {

enum class Activation : int { relu, gelu, gelu_tanh, silu };

// dz = dy * act'(z), and the sums of its columns before they are rounded, from one read of both.
struct ActBwd {
  Activation activation;
  Dtype dtype, out_dtype;      // of dy, z and dz; of dbias
  const void* dy = nullptr;    // element (m, n) is dy[m * dy_row + n * dy_col]
  const void* kept = nullptr;  // z, likewise; for relu the mask: byte b of row m is kept[m * kept_row + b]
  int64_t M, N, dy_row, dy_col, kept_row, kept_col;  // M and N at least 1
  void* dz = nullptr;     // out [M, N], contiguous; null where it is not needed
  void* dbias = nullptr;  // out [N]; null where it is not needed, and for f64
  int threads = 1;        // the result does not depend on it
};

// y = max(z, 0), NaN kept, and a bit for each element that is not z <= 0.
struct ReluFwd {
  Dtype dtype;
  const void* z = nullptr;
  int64_t M, N, row, col;  // M and N at least 1
  void* y = nullptr;       // out [M, N], contiguous
  uint8_t* mask = nullptr; // out [M, ceil(N / 8)], contiguous; bits past N are 0
  int threads = 1;
};

struct ActKernels {
  void (*bwd)(const ActBwd&);
  void (*relu_fwd)(const ReluFwd&);
};

// The kernels compiled for the instruction set in use.
const ActKernels& act_kernels();

}  // namespace peft_kernels
