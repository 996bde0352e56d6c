// bias_grad, relu_fwd and act_bwd for the CUDA key. What the kernels do not take (float64, a dtype of dbias that is neither
// dy's nor float32, a GPU that the extension was not built for) goes to the ops named ..._general, which Python registers.
#include <tuple>

#include "../common/bind_cuda.h"
#include "act_cuda.h"
#include "bias_grad_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;

Tensor bias_grad(const Tensor& dy, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dy.dim() == 2, "bias_grad: dy has shape ", dy.sizes(), "; expected two dimensions, [M, N]");
  const auto general = [&] {
    static const auto op = general_op<decltype(bias_grad)>("peft_kernels::bias_grad_general");
    return op.call(dy, dtype);
  };
  BiasGrad args{};
  args.dtype = dtype_code(dy.scalar_type());
  if (args.dtype < 0 || (dtype != at::kFloat && dtype != dy.scalar_type())) return general();
  const c10::cuda::CUDAGuard guard(dy.device());
  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor dbias = at::empty({dy.size(1)}, options.dtype(dtype));
  args.dy = dy.const_data_ptr(), args.dbias = dbias.mutable_data_ptr();
  args.M = dy.size(0), args.N = dy.size(1);
  args.row_stride = dy.stride(0), args.column_stride = dy.stride(1);
  args.dbias_fp32 = dtype == at::kFloat;
  const int sms = sm_count(dy);
  const Tensor workspace = at::empty({bias_grad_workspace(&args, sms) / 4}, options.dtype(at::kFloat));
  args.workspace = workspace.mutable_data_ptr<float>();
  if (!launched(bias_grad_cuda(&args, sms, current_stream(dy)))) return general();
  return dbias;
}

using Two = std::tuple<Tensor, Tensor>;

Two relu_fwd(const Tensor& z) {
  TORCH_CHECK_VALUE(z.dim() == 2, "relu_fwd: z has shape ", z.sizes(), "; expected two dimensions, [M, N]");
  const auto general = [&] {
    static const auto op = general_op<decltype(relu_fwd)>("peft_kernels::relu_fwd_general");
    return op.call(z);
  };
  ReluFwd args{};
  args.dtype = dtype_code(z.scalar_type());
  if (args.dtype < 0) return general();
  const c10::cuda::CUDAGuard guard(z.device());
  const auto options = z.options().memory_format(at::MemoryFormat::Contiguous);
  args.M = z.size(0), args.N = z.size(1), args.row = z.stride(0), args.column = z.stride(1);
  Tensor y = at::empty({args.M, args.N}, options);
  Tensor mask = at::empty({args.M, (args.N + 7) / 8}, options.dtype(at::kByte));
  args.z = z.const_data_ptr(), args.y = y.mutable_data_ptr(), args.mask = mask.mutable_data_ptr<uint8_t>();
  if (!launched(relu_fwd_cuda(&args, sm_count(z), current_stream(z)))) return general();
  return {y, mask};
}

// The C API's number of an activation; -1 for an unknown one, which the general op names.
int activation_code(c10::string_view name) {
  const char* const names[] = {"relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return i;
  return -1;
}

bool kept_fits(const Tensor& dy, const Tensor& kept, bool relu) {
  return kept.dim() == 2 && kept.size(0) == dy.size(0) && kept.size(1) == (relu ? (dy.size(1) + 7) / 8 : dy.size(1)) &&
         kept.scalar_type() == (relu ? at::kByte : dy.scalar_type()) && kept.device() == dy.device();
}

// What is wrong goes to the general op too, whose errors name the argument.
Two act_bwd(const Tensor& dy, const Tensor& kept, c10::string_view activation, bool need_dz, bool need_dbias,
            at::ScalarType dtype) {
  const auto general = [&] {
    static const auto op = general_op<decltype(act_bwd)>("peft_kernels::act_bwd_general");
    return op.call(dy, kept, activation, need_dz, need_dbias, dtype);
  };
  const int code = dtype_code(dy.scalar_type()), act = activation_code(activation);
  if (code < 0 || act < 0 || dy.dim() != 2 || (dtype != at::kFloat && dtype != dy.scalar_type()) ||
      !kept_fits(dy, kept, act == 0))
    return general();
  const c10::cuda::CUDAGuard guard(dy.device());
  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  ActBwd args{};
  args.M = dy.size(0), args.N = dy.size(1);
  Tensor dz = need_dz ? at::empty({args.M, args.N}, options) : at::empty({0}, options);
  Tensor dbias = at::empty({need_dbias ? args.N : 0}, options.dtype(dtype));
  args.dy = dy.const_data_ptr(), args.kept = kept.const_data_ptr();
  args.dz = need_dz ? dz.mutable_data_ptr() : nullptr, args.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  args.dy_row = dy.stride(0), args.dy_column = dy.stride(1);
  args.kept_row = kept.stride(0), args.kept_column = kept.stride(1);
  args.activation = act, args.dtype = code, args.dbias_fp32 = dtype == at::kFloat;
  const int sms = sm_count(dy);
  const Tensor workspace = at::empty({act_bwd_workspace(&args, sms) / 4}, options.dtype(at::kFloat));
  args.workspace = workspace.mutable_data_ptr<float>();
  if (!launched(act_bwd_cuda(&args, sms, current_stream(dy)))) return general();
  return {dz, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("bias_grad", TORCH_FN(bias_grad));
  m.impl("relu_fwd", TORCH_FN(relu_fwd));
  m.impl("act_bwd", TORCH_FN(act_bwd));
}

}  // namespace peft_kernels
