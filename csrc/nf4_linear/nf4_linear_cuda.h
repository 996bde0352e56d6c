// C API of the forward of the linear layer over a 4-bit weight on a GPU, for few rows: y = x W^T + bias + addend,
// without W in memory. It reads the packed bytes in place, rows of whole blocks of scales (K a multiple of the
// blocksize), packed on 16 bytes; nf4_linear_takes says whether a call is of that kind. Sums in fp32, rounded once.
// Deterministic; no allocation, no synchronization. dtypes: 0 bfloat16, 1 float16, 2 float32.
#pragma once

#include "../common/nf4.h"

extern "C" {

struct Nf4Linear {
  peft_kernels::Nf4Weight weight;  // [N, K]
  const void* x;                   // [M, K]
  const void* bias;                // [N]; null: none
  const void* addend;              // [M, N] of x's dtype; null: none
  void* y;                         // [M, N] of x's dtype
  float* workspace;                // nf4_linear_workspace bytes; null where that is 0
  long long M, N, K;
  long long x_row, x_column, bias_step, addend_row, addend_column;  // strides in elements
  int dtype;                                                        // of x
  int bias_dtype;                                                   // read where bias is there
};

// Rows of x at most; more are for a dequantised weight and a matrix product.
long long nf4_linear_most_rows(int dtype);
// There: how many rows of W [N, K] (columns: for dx) are dequantised at a time, of values of that many bytes; equal
// chunks, or all. The arithmetic of kernels/nf4_linear/configs.py, which has the reasons.
long long nf4_linear_chunk(long long N, long long K, int element_bytes, int columns);

int nf4_linear_takes(const Nf4Linear* args);
long long nf4_linear_workspace(const Nf4Linear* args, int sm_count);

// A cudaError_t; stream is a cudaStream_t of the current device.
int nf4_linear_cuda(const Nf4Linear* args, int sm_count, void* stream);
}
