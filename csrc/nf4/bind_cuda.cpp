// nf4_quantize, nf4_quantize_scales and nf4_dequantize for the CUDA key: checks and outputs. What the kernels do not
// take (float64, weights that are not dense, a GPU that the extension was not built for) goes to the ops named
// ..._general, which Python registers.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../common/nf4_checks.h"
#include "nf4_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// The C API's number of a dtype, -1 for one that it lacks.
int dtype_code(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return 0;
  if (dtype == at::kHalf) return 1;
  return dtype == at::kFloat ? 2 : -1;
}

// False where the extension has no code for this GPU; raises for every other error.
bool launched(int code) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // it is not the next caller's
    return false;
  }
  C10_CUDA_CHECK(error);
  return true;
}

void* current_stream(const Tensor& t) { return c10::cuda::getCurrentCUDAStream(t.get_device()).stream(); }

// ---- quantising ----

using Quantized = std::tuple<Tensor, Tensor>;

Quantized general_quantize(const Tensor& weight, c10::string_view quant_type, int64_t blocksize) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("peft_kernels::nf4_quantize_general", "")
                             .typed<Quantized(const Tensor&, c10::string_view, int64_t)>();
  return op.call(weight, quant_type, blocksize);
}

Quantized nf4_quantize(const Tensor& weight, c10::string_view quant_type, int64_t blocksize) {
  Nf4Quantize args{};
  args.fp4 = check_quant_type("nf4_quantize", quant_type, blocksize);
  args.dtype = dtype_code(weight.scalar_type());
  if (args.dtype < 0 || !weight.is_contiguous()) return general_quantize(weight, quant_type, blocksize);
  const c10::cuda::CUDAGuard guard(weight.device());
  args.numel = weight.numel(), args.blocksize = blocksize;
  const auto options = weight.options().memory_format(std::nullopt);
  Tensor packed = at::empty({(args.numel + 1) / 2}, options.dtype(at::kByte));
  Tensor absmax = at::empty({(args.numel + blocksize - 1) / blocksize}, options.dtype(at::kFloat));
  args.weight = weight.const_data_ptr(), args.packed = packed.mutable_data_ptr<uint8_t>();
  args.absmax = absmax.mutable_data_ptr<float>();
  if (!launched(nf4_quantize_cuda(&args, current_stream(weight))))
    return general_quantize(weight, quant_type, blocksize);
  return {packed, absmax};
}

using Scales = std::tuple<Tensor, Tensor, Tensor>;

Scales general_scales(const Tensor& absmax, const Tensor& nested_code) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("peft_kernels::nf4_quantize_scales_general", "")
                             .typed<Scales(const Tensor&, const Tensor&)>();
  return op.call(absmax, nested_code);
}

Scales nf4_quantize_scales(const Tensor& absmax, const Tensor& nested_code) {
  check_vector("nf4_quantize_scales", "absmax", absmax, at::kFloat, absmax.numel(), absmax.device());
  check_vector("nf4_quantize_scales", "nested_code", nested_code, at::kFloat, 256, absmax.device());
  const c10::cuda::CUDAGuard guard(absmax.device());
  Nf4QuantizeScales args{};
  args.blocks = absmax.numel();
  Tensor codes = at::empty({args.blocks}, absmax.options().dtype(at::kByte));
  Tensor nested_absmax = at::empty({(args.blocks + kNestedBlock - 1) / kNestedBlock}, absmax.options());
  Tensor offset = absmax.mean().view(1);
  args.absmax = absmax.const_data_ptr<float>(), args.nested_code = nested_code.const_data_ptr<float>();
  args.offset = offset.const_data_ptr<float>();
  args.codes = codes.mutable_data_ptr<uint8_t>(), args.nested_absmax = nested_absmax.mutable_data_ptr<float>();
  if (!launched(nf4_quantize_scales_cuda(&args, current_stream(absmax)))) return general_scales(absmax, nested_code);
  return {codes, nested_absmax, offset};
}

// ---- dequantising ----

Tensor general_dequantize(const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                          const Maybe& nested_code, const Maybe& nested_offset, c10::string_view quant_type,
                          int64_t blocksize, int64_t numel, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("peft_kernels::nf4_dequantize_general", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                                           c10::string_view, int64_t, int64_t, at::ScalarType)>();
  return op.call(packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, numel, dtype);
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax, const Maybe& nested_code,
                      const Maybe& nested_offset, c10::string_view quant_type, int64_t blocksize, int64_t numel,
                      at::ScalarType dtype) {
  const auto general = [&] {
    return general_dequantize(packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, numel,
                              dtype);
  };
  Nf4Dequantize args{};
  args.dtype = dtype_code(dtype);
  // The key is CUDA's as soon as one tensor is there; what is wrong then, nf4_weight says.
  args.weight = nf4_weight("nf4_dequantize", packed, absmax, nested_absmax, nested_code, nested_offset, quant_type,
                           blocksize, numel);
  if (args.dtype < 0 || !packed.is_cuda()) return general();
  const c10::cuda::CUDAGuard guard(packed.device());
  Tensor out = at::empty({numel}, packed.options().dtype(dtype));
  args.out = out.mutable_data_ptr();
  if (!launched(nf4_dequantize_cuda(&args, current_stream(packed)))) return general();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("nf4_quantize", TORCH_FN(nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_FN(nf4_quantize_scales));
  m.impl("nf4_dequantize", TORCH_FN(nf4_dequantize));
}

}  // namespace peft_kernels
