// nf4_quantize, nf4_quantize_scales and nf4_dequantize for the CUDA key: checks and outputs. What the kernels do not
// take (float64, weights that are not dense, a GPU that the extension was not built for) goes to the ops named
// ..._general, which Python registers.
#include <optional>
#include <tuple>

#include "../common/bind_cuda.h"
#include "../common/nf4_checks.h"
#include "nf4_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// ---- quantising ----

using Quantized = std::tuple<Tensor, Tensor>;

Quantized nf4_quantize(const Tensor& weight, c10::string_view quant_type, int64_t blocksize) {
  const auto general = [&] {
    static const auto op = general_op<decltype(nf4_quantize)>("peft_kernels::nf4_quantize_general");
    return op.call(weight, quant_type, blocksize);
  };
  Nf4Quantize args{};
  args.fp4 = check_quant_type("nf4_quantize", quant_type, blocksize);
  args.dtype = dtype_code(weight.scalar_type());
  if (args.dtype < 0 || !weight.is_contiguous()) return general();
  const c10::cuda::CUDAGuard guard(weight.device());
  args.numel = weight.numel(), args.blocksize = blocksize;
  const auto options = weight.options().memory_format(std::nullopt);
  Tensor packed = at::empty({(args.numel + 1) / 2}, options.dtype(at::kByte));
  Tensor absmax = at::empty({(args.numel + blocksize - 1) / blocksize}, options.dtype(at::kFloat));
  args.weight = weight.const_data_ptr(), args.packed = packed.mutable_data_ptr<uint8_t>();
  args.absmax = absmax.mutable_data_ptr<float>();
  if (!launched(nf4_quantize_cuda(&args, current_stream(weight)))) return general();
  return {packed, absmax};
}

using Scales = std::tuple<Tensor, Tensor, Tensor>;

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
  if (!launched(nf4_quantize_scales_cuda(&args, current_stream(absmax)))) {
    static const auto op = general_op<decltype(nf4_quantize_scales)>("peft_kernels::nf4_quantize_scales_general");
    return op.call(absmax, nested_code);
  }
  return {codes, nested_absmax, offset};
}

// ---- dequantising ----

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax, const Maybe& nested_code,
                      const Maybe& nested_offset, c10::string_view quant_type, int64_t blocksize, int64_t numel,
                      at::ScalarType dtype) {
  const auto general = [&] {
    static const auto op = general_op<decltype(nf4_dequantize)>("peft_kernels::nf4_dequantize_general");
    return op.call(packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, numel, dtype);
  };
  Nf4Dequantize args{};
  args.dtype = dtype_code(dtype);
  args.weight = nf4_weight("nf4_dequantize", packed, absmax, nested_absmax, nested_code, nested_offset, quant_type,
                           blocksize, numel);
  if (args.dtype < 0) return general();
  const c10::cuda::CUDAGuard guard(packed.device());
  Tensor out = at::empty({numel}, packed.options().dtype(dtype));
  args.out = out.mutable_data_ptr(), args.rows = 1, args.cols = numel;
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
