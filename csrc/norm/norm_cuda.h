// C API of LayerNorm and RMSNorm on a GPU, forward and backward, over the rows of a matrix [M, K]. It takes rows of
// unit column stride that 16-byte loads can read: K a multiple of the elements in 16 bytes of x's dtype, every matrix
// on 16 bytes and its row stride such a multiple too (of no matter where M is 1). norm_*_takes says whether a call is
// of that kind. Deterministic; no allocation, no synchronization. dtypes: 0 bfloat16, 1 float16, 2 float32. Strides: in
// elements, 0 and up; what has none is contiguous.
#pragma once

extern "C" {

struct NormForward {
  const void* x;         // [M, K]
  const void* residual;  // [M, K] of x's dtype, added to x; null: none
  const void* weight;    // [K]; null: ones
  const void* bias;      // [K]; null: zeros
  void* y;               // [M, K]
  void* total;           // [M, K] of x's dtype: x + residual, what is normalized; read only where there is a residual
  float* mean;           // [M]; not written where rms
  float* rstd;           // [M]
  long long M, K;
  long long x_row_stride, residual_row_stride;
  float eps;
  int dtype;                     // of x
  int weight_dtype, bias_dtype;  // read where those are there
  int y_fp32;                    // 1: y is float32 whatever x is
  int rms;                       // 1: RMSNorm
};

struct NormBackward {
  const void* dy;      // [M, K]
  const void* dtotal;  // [M, K] of x's dtype, added to dx; null: none. Read where dx is needed
  const void* x;       // [M, K]: what was normalized. Read where dx or dweight is needed, as mean and rstd
  const void* weight;  // [K]; null: ones. Read where dx is needed
  const float* mean;   // [M]; not read where rms
  const float* rstd;   // [M]
  void* dx;            // [M, K] of x's dtype
  void* dweight;       // [K]
  void* dbias;         // [K]
  float* workspace;    // norm_bwd_workspace bytes; null where that is 0
  long long M, K;
  long long dy_row_stride, dtotal_row_stride, x_row_stride;
  int dtype;         // of x
  int dy_fp32;       // 1: dy is float32 whatever x is
  int weight_dtype;  // read where weight is
  int sums_fp32;     // 1: dweight and dbias are float32 whatever x is
  int rms;           // 1: RMSNorm
  int need_dx, need_dweight, need_dbias;  // the pointers of what is not needed are not looked at
};

int norm_fwd_takes(const NormForward* args);
int norm_bwd_takes(const NormBackward* args);

// Of the GPU that a call is for.
struct NormGpu {
  int sm_count;
  int shared_bytes;  // that a block may ask for
};

// Bytes; depends on sizes, dtypes and what is needed.
long long norm_bwd_workspace(const NormBackward* args, const NormGpu* gpu);

// A cudaError_t; stream is a cudaStream_t of the current device.
int norm_fwd_cuda(const NormForward* args, void* stream);
int norm_bwd_cuda(const NormBackward* args, const NormGpu* gpu, void* stream);
}
