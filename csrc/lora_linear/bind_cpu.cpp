// lora_linear_fwd and lora_linear_bwd for the CPU key: checks, outputs, and the base products where the BLAS makes them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "../common/new_output.h"
#include "lora_linear.h"
#include "plan_cpu.h"

namespace peft_kernels {

PEFT_KERNELS_BY_ISA(LoraKernels, lora_linear_kernels, lora_kernels)

namespace {

std::atomic<BaseBy> chosen_base{BaseBy::automatic};

}  // namespace

BaseBy base_by() { return chosen_base.load(std::memory_order_relaxed); }

void set_base_by(const std::string& name) {
  if (name == "auto")
    chosen_base = BaseBy::automatic;
  else if (name == "blas")
    chosen_base = BaseBy::blas;
  else if (name == "fused")
    chosen_base = BaseBy::fused;
  else
    throw std::invalid_argument("unknown base product '" + name + "'; expected one of auto, blas, fused");
}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The op may be called inside autocast or with tensors that require grad; what happens here is below both.
struct BelowAutogradAndAutocast {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::DispatchKey::AutocastCPU};
};

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default:
      TORCH_CHECK(false, "lora_linear: ", name, " is ", t.scalar_type(), "; expected float32, float64, bfloat16 or float16");
  }
}

void check_shape(const Tensor& t, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK(t.sizes() == expected, "lora_linear: ", name, " has shape ", t.sizes(), "; expected ", expected);
}

// Unit column stride, which the kernels need; any row stride, zero too, stays as it is.
Tensor unit_columns(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

// Dense, and in x's dtype unless the kernel reads any.
Tensor adapter(const Tensor& t, at::ScalarType dtype, bool any) { return (any ? t : t.to(dtype)).contiguous(); }

Rows rows_of(const Tensor& t) { return Rows{t.const_data_ptr(), t.stride(0)}; }

// weight in `dtype`, as a kernel reads it; `kept` owns the memory.
Weight weight_of(const Tensor& weight, at::ScalarType dtype, Tensor& kept) {
  kept = weight.to(dtype);
  if (kept.stride(0) == 1 && kept.stride(1) != 1) return Weight{kept.const_data_ptr(), kept.stride(1), true};
  kept = unit_columns(kept);
  return Weight{kept.const_data_ptr(), kept.stride(0), false};
}

at::ScalarType accumulator(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// In fp16 ATen multiplies row by row without a BLAS when the right operand is not transposed (25 ms a row at 2048 x 2048),
// and slower than fp32 when it is: blocks of rows go through fp32, all but a few rows of the transposed kind.
constexpr int64_t kHalfRows = 256, kHalfVectorRows = 8;

// out += left [M, A] @ right [A, B] with one rounding of the sum; right is a view of weight in any dtype.
//
// The low-rank product stands in `out` already: rounded by itself it keeps its leading bits, while one that is added to a
// 16-bit base below it in size would mostly round away. beta = 1 costs the bf16 BLAS about 3 % of a 2048 x 2048 x 2048 product.
void add_base(Tensor& out, const Tensor& left, const Tensor& right) {
  if (left.size(0) == 0) return;
  const bool transposed = right.stride(0) == 1;
  if (left.scalar_type() != at::kHalf || (transposed && left.size(0) < kHalfVectorRows)) {
    out.addmm_(left, right.to(left.scalar_type()));
    return;
  }
  const Tensor wide = right.to(at::kHalf).to(at::kFloat);
  for (int64_t m = 0; m < left.size(0); m += kHalfRows) {
    Tensor rows = out.slice(0, m, std::min(m + kHalfRows, left.size(0)));
    rows.copy_(rows.to(at::kFloat).addmm_(left.slice(0, m, m + kHalfRows).to(at::kFloat), wide));
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const Tensor& lora_a,
                                           const Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& seed,
                                           double scaling, int64_t threshold) {
  const BelowAutogradAndAutocast guard;
  TORCH_CHECK(x.dim() == 2, "lora_linear: x has shape ", x.sizes(), "; expected two dimensions, [M, K]");
  TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2, "lora_linear: lora_a has shape ", lora_a.sizes(), " and lora_b ",
              lora_b.sizes(), "; expected [R, K] and [N, R]");
  const int64_t M = x.size(0), K = x.size(1), R = lora_a.size(0), N = lora_b.size(0);
  TORCH_CHECK(R > 0, "lora_linear: lora_a has shape ", lora_a.sizes(), "; expected a rank of at least 1");
  check_shape(lora_a, "lora_a", {R, K});
  check_shape(lora_b, "lora_b", {N, R});
  if (weight) check_shape(*weight, "weight", {N, K});
  if (bias) check_shape(*bias, "bias", {N});

  const Tensor x_rows = unit_columns(x);
  const bool few = few_rows(M, seed.has_value());
  const Tensor a = adapter(lora_a, x.scalar_type(), few), b = adapter(lora_b, x.scalar_type(), few);
  const Tensor bias_acc = bias ? bias->to(accumulator(x.scalar_type())).contiguous() : Tensor();
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = new_output({M, N}, options);
  Tensor s = at::empty({M, R}, options);
  Tensor mask = seed ? at::empty({M, (K + 7) / 8}, options.dtype(at::kByte)) : at::empty({0}, options.dtype(at::kByte));

  LoraForward f;
  f.dtype = dtype_of(x, "x"), f.a_dtype = dtype_of(a, "lora_a"), f.b_dtype = dtype_of(b, "lora_b");
  f.M = M, f.N = N, f.K = K, f.R = R;
  f.x = rows_of(x_rows), f.a = rows_of(a), f.b = rows_of(b);
  f.bias = bias ? bias_acc.const_data_ptr() : nullptr;
  f.scaling = scaling;
  f.y = y.mutable_data_ptr(), f.s = s.mutable_data_ptr();
  if (seed) {
    TORCH_CHECK(seed->scalar_type() == at::kLong && seed->numel() == 1, "lora_linear: seed is ", seed->scalar_type(), " ",
                seed->sizes(), "; expected int64 [1]");
    f.mask = mask.mutable_data_ptr<uint8_t>();
    f.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    f.threshold = threshold;
  }
  f.threads = at::get_num_threads();
  Tensor base;
  const bool fused = weight && !few && fuses_base(f.dtype, M, weight->stride(1) == 1);
  if (fused) f.weight = weight_of(*weight, x.scalar_type(), base);
  if (M > 0) lora_kernels().forward(f);
  if (weight && !fused) add_base(y, x_rows, weight->t());
  return {y, s, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                                                    const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& s,
                                                    const Tensor& mask, double scaling, bool need_dx, bool need_dlora_a,
                                                    bool need_dlora_b, bool need_dbias) {
  const BelowAutogradAndAutocast guard;
  TORCH_CHECK(dy.dim() == 2, "lora_linear: dy has shape ", dy.sizes(), "; expected two dimensions, [M, N]");
  TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2, "lora_linear: lora_a has shape ", lora_a.sizes(), " and lora_b ",
              lora_b.sizes(), "; expected [R, K] and [N, R]");
  const int64_t M = dy.size(0), N = dy.size(1), R = lora_a.size(0), K = lora_a.size(1);
  TORCH_CHECK(R > 0, "lora_linear: lora_a has shape ", lora_a.sizes(), "; expected a rank of at least 1");
  check_shape(lora_b, "lora_b", {N, R});
  if (weight) check_shape(*weight, "weight", {N, K});
  TORCH_CHECK(x || !need_dlora_a, "lora_linear: x is None; expected [M, K] because dlora_a is asked for");
  TORCH_CHECK(s || !need_dlora_b, "lora_linear: s is None; expected [M, R] because dlora_b is asked for");
  const at::ScalarType dtype = dy.scalar_type();

  const Tensor dy_rows = unit_columns(dy);
  if (need_dlora_a) check_shape(*x, "x", {M, K});
  if (need_dlora_b) check_shape(*s, "s", {M, R});
  const bool few = few_rows(M, mask.numel() > 0);
  const Tensor a = adapter(lora_a, dtype, few), b = adapter(lora_b, dtype, few);
  Tensor x_rows, s_rows;
  LoraBackward f;
  f.dtype = dtype_of(dy, "dy"), f.a_dtype = dtype_of(a, "lora_a"), f.b_dtype = dtype_of(b, "lora_b");
  f.M = M, f.N = N, f.K = K, f.R = R;
  f.dy = rows_of(dy_rows), f.a = rows_of(a), f.b = rows_of(b);
  if (need_dlora_a) {
    x_rows = unit_columns(x->to(dtype));
    f.x = rows_of(x_rows);
  }
  if (need_dlora_b) {
    s_rows = unit_columns(s->to(dtype));
    f.s = rows_of(s_rows);
  }
  if (mask.numel()) {
    check_shape(mask, "mask", {M, (K + 7) / 8});
    TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == at::kByte, "lora_linear: mask is ", mask.scalar_type(),
                "; expected contiguous uint8");
    f.mask = mask.const_data_ptr<uint8_t>();
  }
  f.scaling = scaling;

  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  const auto out = [&](bool needed, at::IntArrayRef shape, at::ScalarType type, void** data) {
    Tensor t = needed ? new_output(shape, options.dtype(type)) : at::empty({0}, options);
    if (needed) *data = t.mutable_data_ptr();
    return t;
  };
  Tensor dx = out(need_dx, {M, K}, dtype, &f.dx);
  Tensor da = out(need_dlora_a, {R, K}, lora_a.scalar_type(), &f.da);
  Tensor db = out(need_dlora_b, {N, R}, lora_b.scalar_type(), &f.db);
  Tensor dbias = out(need_dbias, {N}, accumulator(dtype), &f.dbias);
  f.da_dtype = dtype_of(lora_a, "lora_a");
  f.db_dtype = dtype_of(lora_b, "lora_b");
  f.threads = at::get_num_threads();
  if (M == 0) f.dx = nullptr;  // an empty tensor's null pointer already says so; the sums below become zero
  Tensor base;
  const bool fused = f.dx && weight && !few && fuses_base(f.dtype, M, weight->stride(1) != 1);
  if (fused) f.weight = weight_of(*weight, dtype, base);
  lora_kernels().backward(f);
  if (need_dx && weight && !fused) add_base(dx, dy_rows, *weight);
  return {dx, da, db, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_FN(forward));
  m.impl("lora_linear_bwd", TORCH_FN(backward));
}

}  // namespace peft_kernels
