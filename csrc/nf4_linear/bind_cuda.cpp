// nf4_linear_fwd and nf4_linear_bwd for the CUDA key: checks, outputs, and which way a product is made. Few rows
// forward run the kernels that read the packed bytes; many rows, and dx, are a dequantised weight and cuBLAS. What is
// left (float64, few rows that the kernels do not take, a GPU that the extension was not built for) goes to the ops
// named ..._general, which Python registers.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <optional>

#include "../common/nf4_checks.h"
#include "../nf4/nf4_cuda.h"
#include "nf4_linear_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr const char* kName = "nf4_linear";

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

int sm_count(const Tensor& t) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device()));
  return count;
}

// What at::mm and the like are called under: their operands have the dtype that they are to have.
struct PlainOps {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// The key is CUDA's as soon as one argument is there: another may be on the host or on another GPU.
void check(const char* name, const Maybe& t, const Tensor& beside, at::IntArrayRef sizes, bool same_dtype) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->device() == beside.device(), kName, ": ", name, " is on ", t->device(), "; expected ",
                    beside.device());
  TORCH_CHECK_VALUE(t->sizes() == sizes, kName, ": ", name, " has shape ", t->sizes(), "; expected ", sizes);
  TORCH_CHECK_VALUE(!same_dtype || t->scalar_type() == beside.scalar_type(), kName, ": ", name, " is ",
                    t->scalar_type(), "; expected ", beside.scalar_type());
}

void check_rows(const char* name, const Tensor& rows, const Tensor& packed) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_floating_point(), kName, ": ", name, " is ", rows.scalar_type(), " ",
                    rows.sizes(), "; expected a floating matrix");
  TORCH_CHECK_VALUE(packed.device() == rows.device(), kName, ": packed is on ", packed.device(), "; expected ",
                    rows.device());
}

// The weight's values [N, K] in the dtype of `like`, to be read at once; undefined where this GPU has no code here.
Tensor dequantized(const Nf4Weight& weight, const Tensor& like, int64_t N, int64_t K) {
  Tensor values = at::empty({N, K}, like.options().memory_format(at::MemoryFormat::Contiguous));
  Nf4Dequantize args{};
  args.weight = weight, args.out = values.mutable_data_ptr();
  args.dtype = dtype_code(like.scalar_type()), args.keep = 1;
  return launched(nf4_dequantize_cuda(&args, current_stream(like))) ? values : Tensor();
}

// a @ b + addend in a's dtype; the addend is only read.
Tensor product(const Tensor& a, const Tensor& b, const Maybe& addend) {
  return addend ? at::addmm(*addend, a, b) : at::mm(a, b);
}

// ---- forward ----

Tensor general_fwd(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                   const Maybe& nested_code, const Maybe& nested_offset, const Maybe& bias, const Maybe& addend,
                   c10::string_view quant_type, int64_t blocksize, int64_t N) {
  using Op = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&,
                    const Maybe&, c10::string_view, int64_t, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("peft_kernels::nf4_linear_fwd_general", "").typed<Op>();
  return op.call(x, packed, absmax, nested_absmax, nested_code, nested_offset, bias, addend, quant_type, blocksize, N);
}

Nf4Linear arguments(const Nf4Weight& weight, const Tensor& x, const Maybe& bias, const Maybe& addend, int64_t N) {
  Nf4Linear args{};
  args.weight = weight;
  args.M = x.size(0), args.N = N, args.K = x.size(1);
  args.x = x.const_data_ptr(), args.x_row = x.stride(0), args.x_column = x.stride(1);
  args.dtype = dtype_code(x.scalar_type());
  if (bias) {
    args.bias = bias->const_data_ptr(), args.bias_step = bias->stride(0);
    args.bias_dtype = dtype_code(bias->scalar_type());
  }
  if (addend) {
    args.addend = addend->const_data_ptr();
    args.addend_row = addend->stride(0), args.addend_column = addend->stride(1);
  }
  return args;
}

// y of few rows; undefined where this GPU has no code here.
Tensor few_rows(Nf4Linear& args, const Tensor& x) {
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = at::empty({args.M, args.N}, options);
  const int sms = sm_count(x);
  const Tensor workspace = at::empty({nf4_linear_workspace(&args, sms) / 4}, options.dtype(at::kFloat));
  args.y = y.mutable_data_ptr(), args.workspace = workspace.mutable_data_ptr<float>();
  return launched(nf4_linear_cuda(&args, sms, current_stream(x))) ? y : Tensor();
}

Tensor nf4_linear_fwd(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                      const Maybe& nested_code, const Maybe& nested_offset, const Maybe& bias, const Maybe& addend,
                      c10::string_view quant_type, int64_t blocksize, int64_t N) {
  const PlainOps plain;
  check_rows("x", x, packed);
  const int64_t M = x.size(0), K = x.size(1);
  const Nf4Weight weight =
      nf4_weight(kName, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, N * K);
  check("bias", bias, x, {N}, false);
  check("addend", addend, x, {M, N}, true);
  const auto general = [&] {
    return general_fwd(x, packed, absmax, nested_absmax, nested_code, nested_offset, bias, addend, quant_type,
                       blocksize, N);
  };
  const int dtype = dtype_code(x.scalar_type());
  if (dtype < 0 || M == 0 || N == 0 || K == 0) return general();
  const c10::cuda::CUDAGuard guard(x.device());
  if (M <= nf4_linear_most_rows(dtype)) {
    Nf4Linear args = arguments(weight, x, bias, addend, N);
    if (!nf4_linear_takes(&args)) return general();
    const Tensor y = few_rows(args, x);
    return y.defined() ? y : general();
  }
  if (dtype == 2 && M <= nf4_linear_most_rows(0)) return general();
  const Tensor values = dequantized(weight, x, N, K);
  if (!values.defined()) return general();
  if (!bias) return product(x, values.t(), addend);
  const Tensor row = bias->to(x.scalar_type());
  return product(x, values.t(), addend ? at::add(*addend, row) : row);
}

// ---- backward ----

Tensor general_bwd(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                   const Maybe& nested_code, const Maybe& nested_offset, const Maybe& addend,
                   c10::string_view quant_type, int64_t blocksize, int64_t K) {
  using Op = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&,
                    c10::string_view, int64_t, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("peft_kernels::nf4_linear_bwd_general", "").typed<Op>();
  return op.call(dy, packed, absmax, nested_absmax, nested_code, nested_offset, addend, quant_type, blocksize, K);
}

Tensor nf4_linear_bwd(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                      const Maybe& nested_code, const Maybe& nested_offset, const Maybe& addend,
                      c10::string_view quant_type, int64_t blocksize, int64_t K) {
  const PlainOps plain;
  check_rows("dy", dy, packed);
  const int64_t M = dy.size(0), N = dy.size(1);
  const Nf4Weight weight =
      nf4_weight(kName, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, N * K);
  check("addend", addend, dy, {M, K}, true);
  const auto general = [&] {
    return general_bwd(dy, packed, absmax, nested_absmax, nested_code, nested_offset, addend, quant_type, blocksize, K);
  };
  if (dtype_code(dy.scalar_type()) < 0 || M == 0 || N == 0 || K == 0) return general();
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor values = dequantized(weight, dy, N, K);
  return values.defined() ? product(dy, values, addend) : general();
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("nf4_linear_fwd", TORCH_FN(nf4_linear_fwd));
  m.impl("nf4_linear_bwd", TORCH_FN(nf4_linear_bwd));
}

}  // namespace peft_kernels
