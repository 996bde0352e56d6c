// The LoRA linear of a few rows: every product is bound by reading W, A and B once, so the BLAS does all of them.
//
// Packing A and B for the blocked kernels would move them twice and wake a team of threads for it; adapters that are wider
// than x would be read and written once more by the cast. Here the rows are cast to the adapters' dtype instead: they are few.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace peft_kernels::few_rows {

using at::Tensor;

constexpr int64_t kMost = 32;

// What the low-rank products are computed in; fp16 has no BLAS on a CPU.
inline at::ScalarType wide_dtype(at::ScalarType x, at::ScalarType adapters) {
  const at::ScalarType wide = at::promote_types(x, adapters);
  return wide == at::kHalf ? at::kFloat : wide;
}

// factor * left @ right, rounded once.
inline Tensor product(const Tensor& left, const Tensor& right, double factor) {
  return at::empty({left.size(0), right.size(1)}, left.options()).addmm_(left, right, 0, factor);
}

// base + factor * left @ right in base's dtype; without a base the product alone.
inline Tensor expand(const std::optional<Tensor>& base, const Tensor& left, const Tensor& right, double factor,
                     at::ScalarType dtype) {
  if (base && base->scalar_type() == left.scalar_type()) return base->addmm(left, right, 1, factor);
  const Tensor delta = product(left, right, factor);
  return (base ? base->to(delta.scalar_type()) + delta : delta).to(dtype);
}

// y [M, N] and s [M, R]; base [M, N] is x @ weight.T + bias, or just the bias expanded, or absent.
inline std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& base, const Tensor& a, const Tensor& b,
                                          double scaling) {
  const at::ScalarType dtype = x.scalar_type(), wide = wide_dtype(dtype, at::promote_types(a.scalar_type(), b.scalar_type()));
  const Tensor s = at::mm(x.to(wide), a.to(wide).t());
  return {expand(base, s, b.to(wide).t(), scaling, dtype).contiguous(), s.to(dtype)};
}

struct Gradients {
  Tensor dx, da, db;
};

// Undefined tensors for what is not needed; base [M, K] is dy @ weight, or absent.
inline Gradients backward(const Tensor& dy, const std::optional<Tensor>& base, const Tensor* x, const Tensor* s, const Tensor& a,
                          const Tensor& b, double scaling, bool need_dx) {
  const at::ScalarType dtype = dy.scalar_type(), wide = wide_dtype(dtype, at::promote_types(a.scalar_type(), b.scalar_type()));
  const Tensor rows = dy.to(wide);
  Gradients out;
  Tensor g;
  if (need_dx || x) g = at::mm(rows, b.to(wide));
  if (need_dx) out.dx = expand(base, g, a.to(wide), scaling, dtype).contiguous();
  if (x) out.da = product(g.t(), x->to(wide), scaling).to(a.scalar_type()).contiguous();
  if (s) out.db = product(rows.t(), s->to(wide), scaling).to(b.scalar_type()).contiguous();
  return out;
}

}  // namespace peft_kernels::few_rows
