// nf4_linear_fwd and nf4_linear_bwd for the CPU key: checks and the outputs.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>

#include "../common/cpu_isa.h"
#include "../common/new_output.h"
#include "../common/nf4_checks.h"
#include "nf4_linear.h"

namespace peft_kernels {

PEFT_KERNELS_BY_ISA(Nf4LinearKernels, nf4_linear_table, nf4_linear_kernels)

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "nf4_linear";

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "nf4_linear: ", name, " is ", t.scalar_type(), " ", t.sizes(), "; expected a floating matrix");
  }
}

// Unit column stride, which the kernels need; any row stride, zero too, stays as it is.
Tensor unit_columns(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

Rows rows_of(const Tensor& t) { return Rows{t.const_data_ptr(), t.stride(0)}; }

// Whether the user lets fp32 products round to bf16: what Torch's own ask on a CPU, whichever of its settings said so.
bool rounds_to_bf16() {
  const auto& context = at::globalContext();
  return context.userEnabledMkldnn() &&
         context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) == at::Float32Precision::BF16;
}

// weight(numel) checks the weight's tensors; `other` is the columns of the result.
template <class Weight>
Tensor product(const Tensor& left, const char* name, const OptionalTensor& bias, const OptionalTensor& addend, int64_t other,
               bool forward, Weight weight) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(left.dim() == 2, "nf4_linear: ", name, " is ", left.scalar_type(), " ", left.sizes(),
                    "; expected a floating matrix");
  Nf4Linear f;
  f.dtype = dtype_of(left, name);
  f.M = left.size(0), f.N = forward ? other : left.size(1), f.K = forward ? left.size(1) : other;
  f.weight = weight(f.N * f.K);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == f.N), "nf4_linear: bias has shape ",
                    bias ? bias->sizes() : at::IntArrayRef(), "; expected [", f.N, "]");
  TORCH_CHECK_VALUE(!addend || (addend->dim() == 2 && addend->size(0) == f.M && addend->size(1) == other &&
                                addend->scalar_type() == left.scalar_type()),
                    "nf4_linear: addend is ", addend ? addend->scalar_type() : left.scalar_type(), " ",
                    addend ? addend->sizes() : at::IntArrayRef(), "; expected ", left.scalar_type(), " [", f.M, ", ", other,
                    "]");
  Tensor out = new_output({f.M, other}, left.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const Tensor rows = unit_columns(left), added = addend ? unit_columns(*addend) : Tensor();
  const Tensor wide = bias ? bias->to(f.dtype == Dtype::f64 ? at::kDouble : at::kFloat).contiguous() : Tensor();
  f.left = rows_of(rows);
  if (addend) f.addend = rows_of(added);
  if (bias) f.bias = wide.const_data_ptr();
  f.out = out.mutable_data_ptr();
  f.threads = at::get_num_threads();
  f.by_bf16 = f.dtype == Dtype::f32 && rounds_to_bf16();
  const Nf4LinearKernels& kernels = nf4_linear_kernels();
  (forward ? kernels.forward : kernels.backward)(f);
  return out;
}

Tensor forward(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
               const OptionalTensor& nested_code, const OptionalTensor& nested_offset, const OptionalTensor& bias,
               const OptionalTensor& addend, c10::string_view quant_type, int64_t blocksize, int64_t N) {
  return product(x, "x", bias, addend, N, true, [&](int64_t numel) {
    return nf4_weight(kName, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, numel);
  });
}

Tensor backward(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                const OptionalTensor& nested_code, const OptionalTensor& nested_offset, const OptionalTensor& addend,
                c10::string_view quant_type, int64_t blocksize, int64_t K) {
  return product(dy, "dy", std::nullopt, addend, K, false, [&](int64_t numel) {
    return nf4_weight(kName, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, numel);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("nf4_linear_fwd", TORCH_FN(forward));
  m.impl("nf4_linear_bwd", TORCH_FN(backward));
}

}  // namespace peft_kernels
