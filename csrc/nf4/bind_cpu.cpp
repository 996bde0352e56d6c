// nf4_quantize, nf4_quantize_scales and nf4_dequantize for the CPU key: checks and outputs.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "../common/cpu_isa.h"
#include "../common/new_output.h"
#include "../common/nf4_checks.h"
#include "nf4.h"

namespace peft_kernels {

PEFT_KERNELS_BY_ISA(Nf4Kernels, nf4_table, nf4_kernels)

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

Dtype dtype_of(const char* op, at::ScalarType type, const char* name, bool wide) {
  switch (type) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    case at::kDouble:
      if (wide) return Dtype::f64;
      [[fallthrough]];
    default:
      TORCH_CHECK_VALUE(false, op, ": ", name, " is ", torch_name(type), "; expected ",
                        wide ? "float16, bfloat16, float32 or float64" : "float16, bfloat16 or float32");
  }
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, c10::string_view quant_type, int64_t blocksize) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Nf4Quantize f;
  f.fp4 = check_quant_type("nf4_quantize", quant_type, blocksize);
  f.dtype = dtype_of("nf4_quantize", weight.scalar_type(), "weight", false);
  f.numel = weight.numel(), f.blocksize = blocksize;
  const auto options = weight.options().memory_format(std::nullopt);
  Tensor packed = new_output({(f.numel + 1) / 2}, options.dtype(at::kByte));
  Tensor absmax = at::empty({(f.numel + blocksize - 1) / blocksize}, options.dtype(at::kFloat));
  if (f.numel == 0) return {packed, absmax};
  const Tensor values = weight.contiguous();
  f.values = values.const_data_ptr(), f.packed = packed.mutable_data_ptr<uint8_t>();
  f.absmax = absmax.mutable_data_ptr<float>(), f.threads = at::get_num_threads();
  nf4_kernels().quantize(f);
  return {packed, absmax};
}

// Above bound i the code is above i. A value midway has the even code of the two: below an even code the bound is the last
// number before the midpoint.
std::array<float, 255> bounds_of(const float* code) {
  std::array<float, 255> bound;
  for (int i = 0; i < 255; ++i) {
    bound[i] = (code[i + 1] + code[i]) * 0.5f;
    if (i % 2) bound[i] = std::nextafter(bound[i], -std::numeric_limits<float>::infinity());
  }
  return bound;
}

std::tuple<Tensor, Tensor, Tensor> nf4_quantize_scales(const Tensor& absmax, const Tensor& nested_code) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "nf4_quantize_scales";
  check_vector(op, "absmax", absmax, at::kFloat, absmax.numel(), absmax.device());
  check_vector(op, "nested_code", nested_code, at::kFloat, 256, absmax.device());
  Nf4QuantizeScales f;
  f.blocks = absmax.numel();
  Tensor codes = at::empty({f.blocks}, absmax.options().dtype(at::kByte));
  Tensor nested_absmax = at::empty({(f.blocks + kNestedBlock - 1) / kNestedBlock}, absmax.options());
  Tensor offset = absmax.mean().view(1);
  if (f.blocks == 0) return {codes, nested_absmax, offset};
  const std::array<float, 255> bound = bounds_of(nested_code.const_data_ptr<float>());
  f.absmax = absmax.const_data_ptr<float>(), f.offset = *offset.const_data_ptr<float>(), f.bound = bound.data();
  f.codes = codes.mutable_data_ptr<uint8_t>(), f.nested_absmax = nested_absmax.mutable_data_ptr<float>();
  f.threads = at::get_num_threads();
  nf4_kernels().quantize_scales(f);
  return {codes, nested_absmax, offset};
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax, const Maybe& nested_code,
                      const Maybe& nested_offset, c10::string_view quant_type, int64_t blocksize, int64_t numel,
                      at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "nf4_dequantize";
  Nf4Dequantize f;
  f.weight = nf4_weight(op, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, numel);
  f.dtype = dtype_of(op, dtype, "dtype", true);
  Tensor values = new_output({numel}, packed.options().dtype(dtype));
  if (numel == 0) return values;
  f.out = values.mutable_data_ptr(), f.threads = at::get_num_threads();
  nf4_kernels().dequantize(f);
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("nf4_quantize", TORCH_FN(nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_FN(nf4_quantize_scales));
  m.impl("nf4_dequantize", TORCH_FN(nf4_dequantize));
}

}  // namespace peft_kernels
