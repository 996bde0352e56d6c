// C API of the activation pass on a GPU: dz = dy * act'(z) and the sums of its columns before rounding, from one read of
// both; and the forward of ReLU with its bits. Deterministic. No allocation, no synchronization.
#pragma once

extern "C" {

struct ActBwd {
  const void* dy;    // [M, N]
  const void* kept;  // z [M, N] of dy's dtype; for ReLU the mask, bytes [M, ceil(N / 8)], lowest bit first
  void* dz;          // [M, N] of dy's dtype, contiguous; null where it is not needed
  void* dbias;       // [N], zeros where M is 0; null where it is not needed
  float* workspace;  // act_bwd_workspace bytes; null where that is 0
  long long M, N;    // 0 and up
  long long dy_row, dy_column, kept_row, kept_column;  // strides in elements, 0 and up
  int activation;    // 0 relu, 1 gelu, 2 gelu_tanh, 3 silu
  int dtype;         // of dy: 0 bfloat16, 1 float16, 2 float32
  int dbias_fp32;    // 1: dbias is float32 whatever dy is
};

struct ReluFwd {
  const void* z;        // [M, N]
  void* y;              // [M, N] of z's dtype, contiguous
  unsigned char* mask;  // [M, ceil(N / 8)], contiguous: bit j of byte b is "not z[m, 8 b + j] <= 0", 0 past N
  long long M, N;
  long long row, column;  // strides of z, in elements, 0 and up
  int dtype;
};

// Bytes. Every member but `workspace` must be as in the call. sm_count: of the GPU that the call is for.
long long act_bwd_workspace(const ActBwd* args, int sm_count);

// A cudaError_t; stream is a cudaStream_t of the current device.
int act_bwd_cuda(const ActBwd* args, int sm_count, void* stream);
int relu_fwd_cuda(const ReluFwd* args, int sm_count, void* stream);
}
