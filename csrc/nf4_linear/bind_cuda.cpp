// nf4_linear_fwd and nf4_linear_bwd for the CUDA key: checks, outputs, and which way a product is made. Few rows
// forward run the kernels that read the packed bytes; many rows, and dx, are a weight dequantised in chunks and cuBLAS.
// What is left (float64, few rows that the kernels do not take, a GPU that the extension was not built for) goes to the ops
// named ..._general, which Python registers.
#include <algorithm>
#include <optional>

#include "../common/bind_cuda.h"
#include "../common/nf4_checks.h"
#include "../nf4/nf4_cuda.h"
#include "nf4_linear_cuda.h"

namespace peft_kernels {

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr const char* kName = "nf4_linear";

void check_rows(const char* name, const Tensor& rows, const Tensor& packed) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_floating_point(), kName, ": ", name, " is ", rows.scalar_type(), " ",
                    rows.sizes(), "; expected a floating matrix");
  TORCH_CHECK_VALUE(packed.device() == rows.device(), kName, ": packed is on ", packed.device(), "; expected ",
                    rows.device());
}

// ---- many rows: a dequantised weight and cuBLAS ----

// `t`, or a copy where a BLAS could not read it in place and at::mm would make one for every chunk.
Tensor for_blas(const Tensor& t) {
  const bool rows = t.stride(1) == 1 && t.stride(0) >= t.size(1), columns = t.stride(0) == 1 && t.stride(1) >= t.size(0);
  return rows || columns ? t : t.contiguous();
}

// The values of `count` rows of W [N, K] from `first` on, or of its columns, in `buffer`; undefined where this GPU has no
// code here.
Tensor dequantized(const Nf4Weight& weight, const Tensor& buffer, bool columns, int64_t N, int64_t K, int64_t first,
                   int64_t count) {
  Nf4Dequantize part{};
  part.weight = weight, part.out = buffer.mutable_data_ptr();
  part.dtype = dtype_code(buffer.scalar_type()), part.keep = 1;
  const bool apart = columns && count < K;
  part.rows = apart ? N : 1, part.cols = apart ? count : count * (columns ? N : K);
  part.start = columns ? first : first * K, part.pitch = K;
  if (!launched(nf4_dequantize_cuda(&part, current_stream(buffer)))) return Tensor();
  return buffer.narrow(0, 0, count * (columns ? N : K)).view({columns ? N : count, -1});
}

// left @ W (columns) or left @ W.T, plus `added` [M, J] or [J], rounded once, in `out` [M, J] where that is given: it may be
// `added`. Each chunk of W makes columns of the result of its own, so that every sum is one GEMM's. Undefined where this
// GPU has no code here.
Tensor product(const Nf4Weight& weight, bool columns, int64_t N, int64_t K, const Tensor& left, const Maybe& added,
               Tensor out) {
  const int64_t J = columns ? K : N, length = columns ? N : K;
  const int64_t lines = nf4_linear_chunk(N, K, static_cast<int>(left.element_size()), columns);
  const auto options = left.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor rows = for_blas(left), buffer = at::empty({lines * length}, options);
  if (!out.defined()) out = at::empty({left.size(0), J}, options);
  for (int64_t first = 0; first < J; first += lines) {
    const int64_t count = std::min(lines, J - first);
    Tensor values = dequantized(weight, buffer, columns, N, K, first, count);
    if (!values.defined()) return Tensor();
    if (!columns) values = values.t();
    Tensor part = out.narrow(1, first, count);
    if (!added) {
      at::mm_out(part, rows, values);
    } else if (added->is_same(out)) {
      part.addmm_(rows, values);
    } else {
      at::addmm_out(part, added->narrow(-1, first, count), rows, values);
    }
  }
  return out;
}

// ---- forward ----

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

// y of many rows, likewise.
Tensor many_rows(const Nf4Weight& weight, const Tensor& x, const Maybe& bias, const Maybe& addend, int64_t N) {
  const Maybe row = bias ? Maybe(bias->to(x.scalar_type())) : std::nullopt;
  if (!row || !addend) return product(weight, false, N, x.size(1), x, row ? row : addend, Tensor());
  Tensor y = at::empty(addend->sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  at::add_out(y, *addend, *row);  // rounded, as the reference does
  return product(weight, false, N, x.size(1), x, y, y);
}

Tensor nf4_linear_fwd(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                      const Maybe& nested_code, const Maybe& nested_offset, const Maybe& bias, const Maybe& addend,
                      c10::string_view quant_type, int64_t blocksize, int64_t N) {
  const BelowAutogradAndAutocast below;
  check_rows("x", x, packed);
  const int64_t M = x.size(0), K = x.size(1);
  const Nf4Weight weight =
      nf4_weight(kName, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, N * K);
  check(kName, "bias", bias, x.device(), {N});
  check(kName, "addend", addend, x.device(), {M, N}, x.scalar_type());
  const auto general = [&] {
    static const auto op = general_op<decltype(nf4_linear_fwd)>("peft_kernels::nf4_linear_fwd_general");
    return op.call(x, packed, absmax, nested_absmax, nested_code, nested_offset, bias, addend, quant_type, blocksize, N);
  };
  const int dtype = dtype_code(x.scalar_type());
  if (dtype < 0 || M == 0 || N == 0 || K == 0) return general();
  const c10::cuda::CUDAGuard guard(x.device());
  const bool few = M <= nf4_linear_most_rows(dtype);
  Nf4Linear args = arguments(weight, x, bias, addend, N);
  if (few && !nf4_linear_takes(&args)) return general();
  const Tensor y = few ? few_rows(args, x) : many_rows(weight, x, bias, addend, N);
  return y.defined() ? y : general();
}

// ---- backward ----

Tensor nf4_linear_bwd(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const Maybe& nested_absmax,
                      const Maybe& nested_code, const Maybe& nested_offset, const Maybe& addend,
                      c10::string_view quant_type, int64_t blocksize, int64_t K) {
  const BelowAutogradAndAutocast below;
  check_rows("dy", dy, packed);
  const int64_t M = dy.size(0), N = dy.size(1);
  const Nf4Weight weight =
      nf4_weight(kName, packed, absmax, nested_absmax, nested_code, nested_offset, quant_type, blocksize, N * K);
  check(kName, "addend", addend, dy.device(), {M, K}, dy.scalar_type());
  const auto general = [&] {
    static const auto op = general_op<decltype(nf4_linear_bwd)>("peft_kernels::nf4_linear_bwd_general");
    return op.call(dy, packed, absmax, nested_absmax, nested_code, nested_offset, addend, quant_type, blocksize, K);
  };
  if (dtype_code(dy.scalar_type()) < 0 || M == 0 || N == 0 || K == 0) return general();
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor dx = product(weight, true, N, K, dy, addend, Tensor());
  return dx.defined() ? dx : general();
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("nf4_linear_fwd", TORCH_FN(nf4_linear_fwd));
  m.impl("nf4_linear_bwd", TORCH_FN(nf4_linear_bwd));
}

}  // namespace peft_kernels
