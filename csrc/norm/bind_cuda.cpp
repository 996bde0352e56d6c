// norm_fwd and norm_bwd for the CUDA key: checks and outputs. What the kernels do not take (float64, rows that 16-byte
// loads cannot read, a GPU that the extension was not built for) goes to norm_fwd_general and norm_bwd_general, which
// Python registers.
#include <optional>
#include <tuple>

#include "../common/bind_cuda.h"
#include "norm_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;
using std::optional;

// Whether a matrix's columns, or a parameter's elements, lie side by side; one that is not there is no obstacle.
bool adjacent(const optional<Tensor>& t) { return !t || t->stride(-1) == 1; }

const void* data(const optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
long long row_stride(const optional<Tensor>& t) { return t ? t->stride(0) : 0; }
int dtype_of(const optional<Tensor>& t) { return t ? dtype_code(t->scalar_type()) : 0; }

// ---- forward ----

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Forward norm_fwd(const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight,
                 const optional<Tensor>& bias, double eps, bool rms, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, "norm_fwd: x has shape ", x.sizes(),
                    "; expected two dimensions, [M, K], K at least 1");
  check("norm_fwd", "residual", residual, x.device(), x.sizes(), x.scalar_type());
  check("norm_fwd", "weight", weight, x.device(), {x.size(1)});
  check("norm_fwd", "bias", bias, x.device(), {x.size(1)});
  const auto general = [&] {
    static const auto op = general_op<decltype(norm_fwd)>("peft_kernels::norm_fwd_general");
    return op.call(x, residual, weight, bias, eps, rms, dtype);
  };
  const bool float_or_own = dtype == at::kFloat || dtype == x.scalar_type();
  if (!float_or_own || !adjacent(x) || !adjacent(residual) || !adjacent(weight) || !adjacent(bias)) return general();
  NormForward args{};
  args.x = x.const_data_ptr(), args.residual = data(residual);
  args.weight = data(weight), args.bias = data(bias);
  args.M = x.size(0), args.K = x.size(1);
  args.x_row_stride = x.stride(0), args.residual_row_stride = row_stride(residual);
  args.eps = static_cast<float>(eps);
  args.dtype = dtype_code(x.scalar_type());
  args.weight_dtype = dtype_of(weight), args.bias_dtype = dtype_of(bias);
  args.y_fp32 = dtype == at::kFloat, args.rms = rms;
  if (!norm_fwd_takes(&args)) return general();
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = at::empty(x.sizes(), options.dtype(dtype));
  Tensor total = residual ? at::empty(x.sizes(), options) : at::empty({0}, options);
  Tensor mean = at::empty({rms ? 0 : args.M}, options.dtype(at::kFloat));
  Tensor rstd = at::empty({args.M}, options.dtype(at::kFloat));
  args.y = y.mutable_data_ptr(), args.total = total.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr<float>(), args.rstd = rstd.mutable_data_ptr<float>();
  if (!launched(norm_fwd_cuda(&args, current_stream(x)))) return general();
  return {y, total, mean, rstd};
}

// ---- backward ----

using Backward = std::tuple<Tensor, Tensor, Tensor>;

Backward norm_bwd(const Tensor& dy, const optional<Tensor>& dtotal, const optional<Tensor>& x,
                  const optional<Tensor>& mean, const optional<Tensor>& rstd, const optional<Tensor>& weight, bool rms,
                  bool need_dx, bool need_dweight, bool need_dbias, at::ScalarType dtype, at::ScalarType dx_dtype) {
  TORCH_CHECK_VALUE(dy.dim() == 2 && dy.size(1) > 0, "norm_bwd: dy has shape ", dy.sizes(),
                    "; expected two dimensions, [M, K], K at least 1");
  const auto general = [&] {
    static const auto op = general_op<decltype(norm_bwd)>("peft_kernels::norm_bwd_general");
    return op.call(dy, dtotal, x, mean, rstd, weight, rms, need_dx, need_dweight, need_dbias, dtype, dx_dtype);
  };
  const bool reads_x = need_dx || need_dweight, fp32_dy = dy.scalar_type() == at::kFloat;
  const bool dtypes = (fp32_dy || dy.scalar_type() == dx_dtype) && (dtype == at::kFloat || dtype == dx_dtype);
  if (!dtypes || dtype_code(dx_dtype) < 0) return general();  // and what is wrong there is said there
  check("norm_bwd", "dtotal", dtotal, dy.device(), dy.sizes(), dx_dtype);
  check("norm_bwd", "weight", weight, dy.device(), {dy.size(1)});
  check("norm_bwd", "x", x, dy.device(), dy.sizes(), dx_dtype);
  if (!rms) check("norm_bwd", "mean", mean, dy.device(), {dy.size(0)}, at::kFloat);
  check("norm_bwd", "rstd", rstd, dy.device(), {dy.size(0)}, at::kFloat);
  TORCH_CHECK_VALUE(!reads_x || (x && rstd && (rms || mean)),
                    "norm_bwd: x, mean or rstd is None; expected them, as dx or dweight is asked for");
  if (!adjacent(dy) || !adjacent(dtotal) || !adjacent(weight) || !adjacent(x) || !adjacent(rstd)) return general();
  if (!rms && !adjacent(mean)) return general();
  NormBackward args{};
  args.dy = dy.const_data_ptr(), args.dtotal = data(dtotal), args.x = data(x), args.weight = data(weight);
  args.mean = static_cast<const float*>(rms ? nullptr : data(mean)), args.rstd = static_cast<const float*>(data(rstd));
  args.M = dy.size(0), args.K = dy.size(1);
  args.dy_row_stride = dy.stride(0), args.dtotal_row_stride = row_stride(dtotal), args.x_row_stride = row_stride(x);
  args.dtype = dtype_code(dx_dtype), args.dy_fp32 = fp32_dy;
  args.weight_dtype = dtype_of(weight), args.sums_fp32 = dtype == at::kFloat, args.rms = rms;
  args.need_dx = need_dx, args.need_dweight = need_dweight, args.need_dbias = need_dbias;
  if (!norm_bwd_takes(&args)) return general();
  const c10::cuda::CUDAGuard guard(dy.device());
  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor dx = need_dx ? at::empty(dy.sizes(), options.dtype(dx_dtype)) : at::empty({0}, options.dtype(dx_dtype));
  Tensor dweight = at::empty({need_dweight ? args.K : 0}, options.dtype(dtype));
  Tensor dbias = at::empty({need_dbias ? args.K : 0}, options.dtype(dtype));
  args.dx = dx.mutable_data_ptr(), args.dweight = dweight.mutable_data_ptr(), args.dbias = dbias.mutable_data_ptr();
  const NormGpu gpu{sm_count(dy), attribute(dy, cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  const Tensor workspace = at::empty({norm_bwd_workspace(&args, &gpu) / 4}, options.dtype(at::kFloat));
  args.workspace = workspace.mutable_data_ptr<float>();
  if (!launched(norm_bwd_cuda(&args, &gpu, current_stream(dy)))) return general();
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("norm_fwd", TORCH_FN(norm_fwd));
  m.impl("norm_bwd", TORCH_FN(norm_bwd));
}

}  // namespace peft_kernels
