// norm_fwd and norm_bwd for the CPU key: checks and outputs, and fp64, which is plain ATen code.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../common/column_sum.h"
#include "../common/cpu_isa.h"
#include "../common/new_output.h"
#include "norm.h"

namespace peft_kernels {

PEFT_KERNELS_BY_ISA(NormKernels, norm_table, norm_kernels)

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

Dtype dtype_of(const char* op, at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK_VALUE(false, op, ": ", name, " is ", type, "; expected float32, float64, bfloat16 or float16");
  }
}

void check_matrix(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) > 0, op, ": ", name, " is ", t.scalar_type(), " ", t.sizes(),
                    "; expected two dimensions, [M, K], K at least 1");
}

void check_like(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.sizes() == shape && t.scalar_type() == dtype, op, ": ", name, " is ", t.scalar_type(), " ", t.sizes(),
                    "; expected ", dtype, " ", shape);
}

void check_row(const char* op, const char* name, const Maybe& row, int64_t K) {
  if (!row) return;
  dtype_of(op, row->scalar_type(), name);
  TORCH_CHECK_VALUE(row->dim() == 1 && row->size(0) == K, op, ": ", name, " is ", row->scalar_type(), " ", row->sizes(),
                    "; expected [", K, "]");
}

void check_dtype(const char* op, at::ScalarType dtype, at::ScalarType own) {
  TORCH_CHECK_VALUE(dtype == own || dtype == accumulator(own), op, ": dtype is ", dtype, "; expected ", own, " as x, or ",
                    accumulator(own));
}

Strided strided(const Maybe& t) { return t ? Strided{t->const_data_ptr(), t->stride(0), t->stride(1)} : Strided{}; }

// A weight or bias as the kernels read it.
Tensor row_or(const Maybe& row, double otherwise, int64_t K, const Tensor& like) {
  if (row) return row->to(at::kFloat).contiguous();
  return at::full({K}, otherwise, like.options().dtype(at::kFloat));
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

Forward forward_f64(const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool rms) {
  const Tensor total = residual ? (x + *residual).contiguous() : at::empty({0}, x.options());
  Tensor centred = (residual ? total : x).contiguous();
  Tensor mean = at::empty({0}, x.options());
  if (!rms) {
    mean = centred.mean(1);
    centred = centred - mean.unsqueeze(1);
  }
  const Tensor rstd = (centred.square().mean(1) + eps).rsqrt();
  Tensor y = centred * rstd.unsqueeze(1);
  if (weight) y = y * weight->to(at::kDouble);
  if (bias) y = y + bias->to(at::kDouble);
  return {y, total, mean, rstd};
}

Backward backward_f64(const Tensor& dy, const Maybe& dtotal, const Maybe& x, const Maybe& mean, const Maybe& rstd,
                      const Maybe& weight, bool rms, bool need_dx, bool need_dweight, bool need_dbias) {
  Tensor dx = at::empty({0}, dy.options()), dweight = dx, dbias = at::empty({0}, dy.options());
  if (need_dbias) dbias = dy.sum(0);
  if (!need_dx && !need_dweight) return {dx, at::empty({0}, dy.options()), dbias};
  const Tensor scale = rstd->unsqueeze(1);
  const Tensor xhat = (rms ? *x : *x - mean->unsqueeze(1)) * scale;
  dweight = need_dweight ? (dy * xhat).sum(0) : at::empty({0}, dy.options());
  if (need_dx) {
    const Tensor g = weight ? dy * weight->to(at::kDouble) : dy;
    dx = g - xhat * (g * xhat).mean(1, true);
    if (!rms) dx = dx - g.mean(1, true);
    dx = dx * scale;
    if (dtotal) dx = dx + *dtotal;
    dx = dx.contiguous();
  }
  return {dx, dweight, dbias};
}

Forward norm_fwd(const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool rms,
                 at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "norm_fwd";
  check_matrix(op, "x", x);
  NormFwd f;
  f.dtype = dtype_of(op, x.scalar_type(), "x"), f.out_dtype = dtype_of(op, dtype, "dtype");
  f.M = x.size(0), f.K = x.size(1);
  if (residual) check_like(op, "residual", *residual, x.sizes(), x.scalar_type());
  check_row(op, "weight", weight, f.K), check_row(op, "bias", bias, f.K);
  check_dtype(op, dtype, x.scalar_type());
  if (f.dtype == Dtype::f64) return forward_f64(x, residual, weight, bias, eps, rms);

  const auto options = x.options(), wide = options.dtype(at::kFloat);
  Tensor y = new_output({f.M, f.K}, options.dtype(dtype));
  Tensor total = residual ? new_output({f.M, f.K}, options) : at::empty({0}, options);
  Tensor mean = at::empty({rms ? 0 : f.M}, wide), rstd = at::empty({f.M}, wide);
  if (f.M == 0) return {y, total, mean, rstd};
  const Tensor weights = row_or(weight, 1, f.K, x), biases = row_or(bias, 0, f.K, x);
  f.x = strided(x), f.residual = strided(residual);
  f.weight = weights.const_data_ptr<float>(), f.bias = biases.const_data_ptr<float>();
  f.eps = eps, f.rms = rms;
  f.y = y.mutable_data_ptr(), f.total = residual ? total.mutable_data_ptr() : nullptr;
  f.mean = rms ? nullptr : mean.mutable_data_ptr<float>(), f.rstd = rstd.mutable_data_ptr<float>();
  f.threads = at::get_num_threads();
  norm_kernels().forward(f);
  return {y, total, mean, rstd};
}

// What dx and dweight are made of must be there, and what is there must fit dy.
void check_parts(const Tensor& dy, const Maybe& dtotal, const Maybe& x, const Maybe& mean, const Maybe& rstd, bool rms,
                 bool normalises, at::ScalarType own) {
  const char* op = "norm_bwd";
  const int64_t rows[] = {dy.size(0)};
  struct Part {
    const char* name;
    const Maybe& tensor;
    bool needed;
    at::IntArrayRef shape;
    at::ScalarType dtype;
  };
  for (const Part& part : {Part{"dtotal", dtotal, false, dy.sizes(), own}, Part{"x", x, normalises, dy.sizes(), own},
                           Part{"mean", mean, normalises && !rms, rows, accumulator(own)},
                           Part{"rstd", rstd, normalises, rows, accumulator(own)}}) {
    TORCH_CHECK_VALUE(part.tensor || !part.needed, op, ": ", part.name, " is None; expected ", part.dtype, " ", part.shape,
                      ", as dx or dweight is asked for");
    if (part.tensor && !(rms && &part.tensor == &mean)) check_like(op, part.name, *part.tensor, part.shape, part.dtype);
  }
}

void sum_columns(const Tensor& dy, const Tensor& dbias) {
  ColumnSum f;
  f.dtype = dtype_of("norm_bwd", dy.scalar_type(), "dy"), f.out_dtype = dtype_of("norm_bwd", dbias.scalar_type(), "dtype");
  f.M = dy.size(0), f.N = dy.size(1), f.row = dy.stride(0), f.col = dy.stride(1);
  f.matrix = dy.const_data_ptr(), f.sums = dbias.mutable_data_ptr();
  f.threads = at::get_num_threads();
  column_sum_kernels().run(f);
}

Backward norm_bwd(const Tensor& dy, const Maybe& dtotal, const Maybe& x, const Maybe& mean, const Maybe& rstd,
                  const Maybe& weight, bool rms, bool need_dx, bool need_dweight, bool need_dbias, at::ScalarType dtype,
                  at::ScalarType dx_dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "norm_bwd";
  check_matrix(op, "dy", dy);
  NormBwd f;
  f.dtype = dtype_of(op, dx_dtype, "dx_dtype"), f.dy_dtype = dtype_of(op, dy.scalar_type(), "dy");
  TORCH_CHECK_VALUE(dy.scalar_type() == dx_dtype || dy.scalar_type() == accumulator(dx_dtype), op, ": dy is ",
                    dy.scalar_type(), "; expected ", dx_dtype, " as dx, or ", accumulator(dx_dtype));
  f.out_dtype = dtype_of(op, dtype, "dtype");
  f.M = dy.size(0), f.K = dy.size(1);
  check_dtype(op, dtype, dx_dtype);
  check_parts(dy, dtotal, x, mean, rstd, rms, need_dx || need_dweight, dx_dtype);
  check_row(op, "weight", weight, f.K);
  if (f.dtype == Dtype::f64) return backward_f64(dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias);

  const int64_t none[] = {0}, row[] = {f.K};
  const auto out = [&](bool needed, at::IntArrayRef shape, at::ScalarType kind) {
    return new_output(needed ? shape : at::IntArrayRef(none), dy.options().dtype(kind));
  };
  Tensor dx = out(need_dx, dy.sizes(), dx_dtype), dweight = out(need_dweight, row, dtype), dbias = out(need_dbias, row, dtype);
  if (f.M == 0) return {dx, dweight.zero_(), dbias.zero_()};
  if (!need_dx && !need_dweight) {
    if (need_dbias) sum_columns(dy, dbias);
    return {dx, dweight, dbias};
  }
  const Tensor weights = row_or(weight, 1, f.K, dy), scales = rstd->contiguous(), means = rms ? Tensor() : mean->contiguous();
  f.dy = strided(dy), f.dtotal = strided(need_dx ? dtotal : Maybe()), f.x = strided(x);
  f.mean = rms ? nullptr : means.const_data_ptr<float>(), f.rstd = scales.const_data_ptr<float>();
  f.weight = weights.const_data_ptr<float>(), f.rms = rms;
  f.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  f.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  f.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  f.threads = at::get_num_threads();
  norm_kernels().backward(f);
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("norm_fwd", TORCH_FN(norm_fwd));
  m.impl("norm_bwd", TORCH_FN(norm_bwd));
}

}  // namespace peft_kernels
