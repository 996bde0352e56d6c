// bias_grad for the CUDA key. What the kernels do not take (float64, a dtype of dbias that is neither dy's nor float32, a
// GPU that the extension was not built for) goes to bias_grad_general, which Python registers.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <optional>

#include "bias_grad_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;

// The C API's number of a dtype.
std::optional<int> dtype_code(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return 0;
  if (dtype == at::kHalf) return 1;
  if (dtype == at::kFloat) return 2;
  return std::nullopt;
}

Tensor general(const Tensor& dy, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("peft_kernels::bias_grad_general", "")
                             .typed<Tensor(const Tensor&, at::ScalarType)>();
  return op.call(dy, dtype);
}

int sm_count(const Tensor& t) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device()));
  return count;
}

bool no_code_for_this_gpu(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
}

Tensor bias_grad(const Tensor& dy, at::ScalarType dtype) {
  TORCH_CHECK(dy.dim() == 2, "dy has shape ", dy.sizes(), ", expected [M, N]");
  const std::optional<int> code = dtype_code(dy.scalar_type());
  if (!code || (dtype != at::kFloat && dtype != dy.scalar_type())) return general(dy, dtype);
  const c10::cuda::CUDAGuard guard(dy.device());
  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor dbias = at::empty({dy.size(1)}, options.dtype(dtype));
  BiasGrad args{};
  args.dy = dy.const_data_ptr(), args.dbias = dbias.mutable_data_ptr();
  args.M = dy.size(0), args.N = dy.size(1);
  args.row_stride = dy.stride(0), args.column_stride = dy.stride(1);
  args.dtype = *code;
  args.dbias_fp32 = dtype == at::kFloat;
  const int sms = sm_count(dy);
  const Tensor workspace = at::empty({bias_grad_workspace(&args, sms) / 4}, options.dtype(at::kFloat));
  args.workspace = workspace.mutable_data_ptr<float>();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(dy.get_device()).stream();
  const auto error = static_cast<cudaError_t>(bias_grad_cuda(&args, sms, stream));
  if (no_code_for_this_gpu(error)) {
    cudaGetLastError();  // it is not the next caller's
    return general(dy, dtype);
  }
  C10_CUDA_CHECK(error);
  return dbias;
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl("bias_grad", TORCH_FN(bias_grad)); }

}  // namespace peft_kernels
