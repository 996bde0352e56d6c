// bias_grad, relu_fwd and act_bwd for the CPU key: checks and the outputs.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../common/column_sum.h"
#include "../common/cpu_isa.h"
#include "../common/new_output.h"
#include "act.h"

namespace peft_kernels {

PEFT_KERNELS_BY_ISA(ColumnSumKernels, column_sum_table, column_sum_kernels)
PEFT_KERNELS_BY_ISA(ActKernels, act_table, act_kernels)

namespace {

using at::Tensor;

Dtype dtype_of(at::ScalarType type, const char* op, const char* name) {
  switch (type) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK_VALUE(false, op, ": ", name, " is ", type, "; expected float32, float64, bfloat16 or float16");
  }
}

void check_sums(const char* op, const Tensor& dy, at::ScalarType dtype) {
  const at::ScalarType wide = dy.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(dy.dim() == 2, op, ": dy has shape ", dy.sizes(), "; expected two dimensions, [M, N]");
  TORCH_CHECK_VALUE(dtype == wide || dtype == dy.scalar_type(), op, ": dtype is ", dtype, "; expected ", dy.scalar_type(),
              " as dy, or ", wide);
}

Tensor bias_grad(const Tensor& dy, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  ColumnSum f;
  f.dtype = dtype_of(dy.scalar_type(), "bias_grad", "dy"), f.out_dtype = dtype_of(dtype, "bias_grad", "dtype");
  check_sums("bias_grad", dy, dtype);
  if (f.dtype == Dtype::f64) return dy.sum(0);
  f.M = dy.size(0), f.N = dy.size(1), f.row = dy.stride(0), f.col = dy.stride(1);
  Tensor dbias = at::empty({f.N}, dy.options().dtype(dtype));
  if (f.N == 0) return dbias;
  if (f.M == 0) return dbias.zero_();
  f.matrix = dy.const_data_ptr(), f.sums = dbias.mutable_data_ptr();
  f.threads = at::get_num_threads();
  column_sum_kernels().run(f);
  return dbias;
}

std::tuple<Tensor, Tensor> relu_fwd(const Tensor& z) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  ReluFwd f;
  f.dtype = dtype_of(z.scalar_type(), "relu_fwd", "z");
  TORCH_CHECK_VALUE(z.dim() == 2, "relu_fwd: z has shape ", z.sizes(), "; expected two dimensions, [M, N]");
  f.M = z.size(0), f.N = z.size(1), f.row = z.stride(0), f.col = z.stride(1);
  Tensor y = new_output({f.M, f.N}, z.options()), mask = at::empty({f.M, (f.N + 7) / 8}, z.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, mask};
  f.z = z.const_data_ptr(), f.y = y.mutable_data_ptr(), f.mask = mask.mutable_data_ptr<uint8_t>();
  f.threads = at::get_num_threads();
  act_kernels().relu_fwd(f);
  return {y, mask};
}

Activation activation_of(c10::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  TORCH_CHECK_VALUE(false, "act_bwd: activation is '", name, "'; expected one of relu, gelu, gelu_tanh, silu");
}

void check_kept(const Tensor& dy, const Tensor& kept, c10::string_view activation) {
  const bool relu = activation == "relu";
  const char* what = relu ? "the mask" : "z";
  const int64_t M = dy.size(0), N = dy.size(1), columns = relu ? (N + 7) / 8 : N;
  const at::ScalarType type = relu ? at::kByte : dy.scalar_type();
  TORCH_CHECK_VALUE(kept.dim() == 2 && kept.size(0) == M && kept.size(1) == columns, "act_bwd: kept has shape ", kept.sizes(),
              "; expected [", M, ", ", columns, "], ", what, " of dy [", M, ", ", N, "]");
  TORCH_CHECK_VALUE(kept.scalar_type() == type, "act_bwd: kept is ", kept.scalar_type(), "; expected ", type, ", ", what, " for ", activation);
  TORCH_CHECK_VALUE(kept.device() == dy.device(), "act_bwd: kept is on ", kept.device(), "; expected ", dy.device(), ", as dy");
}

std::tuple<Tensor, Tensor> act_bwd(const Tensor& dy, const Tensor& kept_as_given, c10::string_view activation, bool need_dz,
                                   bool need_dbias, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  ActBwd f;
  f.activation = activation_of(activation);
  f.dtype = dtype_of(dy.scalar_type(), "act_bwd", "dy"), f.out_dtype = dtype_of(dtype, "act_bwd", "dtype");
  check_sums("act_bwd", dy, dtype);
  const bool relu = f.activation == Activation::relu, sums_of_dz = f.dtype == Dtype::f64 && need_dbias;
  check_kept(dy, kept_as_given, activation);
  const Tensor kept = relu ? kept_as_given.contiguous() : kept_as_given;
  f.M = dy.size(0), f.N = dy.size(1), f.dy_row = dy.stride(0), f.dy_col = dy.stride(1);
  f.kept_row = kept.stride(0), f.kept_col = kept.stride(1);
  const auto options = dy.options();
  Tensor dz = need_dz || sums_of_dz ? new_output({f.M, f.N}, options) : at::empty({0}, options);
  Tensor dbias = at::empty({need_dbias ? f.N : 0}, options.dtype(dtype));
  if (f.N > 0 && f.M == 0) dbias.zero_();
  if (dy.numel() > 0 && (need_dz || need_dbias)) {
    f.dy = dy.const_data_ptr(), f.kept = kept.const_data_ptr();
    f.dz = dz.numel() > 0 ? dz.mutable_data_ptr() : nullptr;
    f.dbias = need_dbias && !sums_of_dz ? dbias.mutable_data_ptr() : nullptr;
    f.threads = at::get_num_threads();
    act_kernels().bwd(f);
    if (sums_of_dz) dbias = dz.sum(0);
  }
  return {need_dz ? dz : at::empty({0}, options), dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("bias_grad", TORCH_FN(bias_grad));
  m.impl("relu_fwd", TORCH_FN(relu_fwd));
  m.impl("act_bwd", TORCH_FN(act_bwd));
}

}  // namespace peft_kernels
