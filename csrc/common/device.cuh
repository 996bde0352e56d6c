// What kernel source takes from its compiler. nvcc's half is here; the host compiler's, which runs the same source on a
// CPU, is tests/cuda_host/simt.h. Kernels say `shared` and `launch` for what CUDA spells in syntax of its own.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>

namespace peft_kernels {

// The block's one object of that type, uninitialized: __shared__ T.
template <typename T>
__device__ __forceinline__ T& shared() {
  __shared__ T object;
  return object;
}

// The launch's dynamic shared memory, on 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

// 2^x to 2 ulp and 1 / x to 1 ulp, by the special function unit; what is below the smallest normal number is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// kernel<<<grid, block, dynamic_bytes, stream>>>(arguments...), with this launch's own error, not an earlier one's.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (dynamic_bytes > 0) {  // with what is static it may be more than the 48 KB that a kernel has unasked
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace peft_kernels

#else
#include "simt.h"
#endif
