// bias_grad for the CPU key: checks and the output.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../common/column_sum.h"
#include "../common/cpu_isa.h"

namespace peft_kernels {

PEFT_KERNELS_BY_ISA(ColumnSumKernels, column_sum_table, column_sum_kernels)

namespace {

using at::Tensor;

Dtype dtype_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "bias_grad: ", name, " is ", type, "; expected float32, float64, bfloat16 or float16");
  }
}

Tensor bias_grad(const Tensor& dy, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::ScalarType wide = dy.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  ColumnSum f;
  f.dtype = dtype_of(dy.scalar_type(), "dy"), f.out_dtype = dtype_of(dtype, "dtype");
  TORCH_CHECK(dy.dim() == 2, "bias_grad: dy has shape ", dy.sizes(), "; expected two dimensions, [M, N]");
  TORCH_CHECK(dtype == wide || dtype == dy.scalar_type(), "bias_grad: dtype is ", dtype, "; expected ", dy.scalar_type(),
              " as dy, or ", wide);
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

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("bias_grad", TORCH_FN(bias_grad)); }

}  // namespace peft_kernels
