// What the bindings for the CUDA key share: dtypes as the C APIs number them, checks, the device and the stream of a call,
// a launch's error, and the ops that take what the kernels do not.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <optional>

namespace peft_kernels {

// The C APIs' number of a dtype, -1 for one that they lack.
inline int dtype_code(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return 0;
  if (dtype == at::kHalf) return 1;
  return dtype == at::kFloat ? 2 : -1;
}

inline int attribute(const at::Tensor& t, cudaDeviceAttr which) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, t.get_device()));
  return value;
}

inline int sm_count(const at::Tensor& t) { return attribute(t, cudaDevAttrMultiProcessorCount); }

inline void* current_stream(const at::Tensor& t) {
  return c10::cuda::getCurrentCUDAStream(t.get_device()).stream();
}

// Of a kernel's return code: false where the extension has no code for this GPU; raises for every other error.
inline bool launched(int code) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // it is not the next caller's
    return false;
  }
  C10_CUDA_CHECK(error);
  return true;
}

// The op of that name and of that function's signature. For those named ..._general, which take what the kernels do not:
// looked up when first needed, as Python registers them after the extension is loaded.
template <typename Op>
c10::TypedOperatorHandle<Op> general_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

// An op may be called inside autocast or with tensors that require grad; what it calls under this is below both.
struct BelowAutogradAndAutocast {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// The key is CUDA's as soon as one argument is there: another, `device`'s too, may be on the host or on another GPU.
inline void check(const char* op, const char* name, const std::optional<at::Tensor>& t, at::Device device,
                  at::IntArrayRef sizes, std::optional<at::ScalarType> dtype = std::nullopt) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->device() == device, op, ": ", name, " is on ", t->device(),
                    "; expected one GPU for all arguments, the first is on ", device);
  TORCH_CHECK_VALUE(t->sizes() == sizes, op, ": ", name, " has shape ", t->sizes(), "; expected ", sizes);
  TORCH_CHECK_VALUE(!dtype || t->scalar_type() == *dtype, op, ": ", name, " is ", t->scalar_type(), "; expected ",
                    *dtype);
}

}  // namespace peft_kernels
