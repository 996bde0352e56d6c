// What csrc/common/bind_cuda.h takes from CUDA and from Torch's CUDA half, where a binding runs on a CPU over the shim.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoKernelImageForDevice = 209 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// An A100's but for the number of its SMs.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount      ? 4
           : which == cudaDevAttrComputeCapabilityMajor ? 8
           : which == cudaDevAttrComputeCapabilityMinor ? 0
                                                        : 163 << 10;
  return cudaSuccess;
}

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, "CUDA error in ", #call)

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};

struct CUDAStream {
  void* stream() const { return nullptr; }
};

inline CUDAStream getCurrentCUDAStream(c10::DeviceIndex) { return {}; }

}  // namespace c10::cuda
