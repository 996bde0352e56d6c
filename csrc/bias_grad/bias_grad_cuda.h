// C API of the bias gradient on a GPU: dbias [N] = column sums of dy [M, N], any strides.
// Deterministic; sums to a few fp32 roundings for any M, rounded once more where dbias has 16 bits. No allocation, no
// synchronization.
#pragma once

extern "C" {

struct BiasGrad {
  const void* dy;          // [M, N]
  void* dbias;             // [N], contiguous; written whole, zeros where M is 0
  float* workspace;        // bias_grad_workspace bytes; null where that is 0
  long long M, N;          // 0 and up
  long long row_stride, column_stride;  // of dy, in elements, 0 and up
  int dtype;               // of dy: 0 bfloat16, 1 float16, 2 float32
  int dbias_fp32;          // 1: dbias is float32 whatever dy is
};

// Bytes; depends on everything but dbias and workspace themselves. sm_count: of the GPU that the call is for.
long long bias_grad_workspace(const BiasGrad* args, int sm_count);

// A cudaError_t; stream is a cudaStream_t of the current device.
int bias_grad_cuda(const BiasGrad* args, int sm_count, void* stream);
}
