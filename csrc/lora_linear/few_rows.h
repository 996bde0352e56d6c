// The LoRA linear of a few rows: every product is bound by reading W, A and B once, so the BLAS does all of them.
//
// Packing A and B for the blocked kernels would move them twice and wake a team of threads for it; adapters that are wider
// than x would be read and written once more by the cast. Here the rows are cast to the adapters' dtype instead: they are few.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

namespace peft_kernels::few_rows {

using at::Tensor;

constexpr int64_t kMost = 4;
constexpr int64_t kLongChain = 2048;  // terms that the BLAS may add in one chain

// What the low-rank products are computed in; fp16 has no BLAS on a CPU.
inline at::ScalarType wide_dtype(at::ScalarType x, const Tensor& a, const Tensor& b) {
  const at::ScalarType wide = at::promote_types(x, at::promote_types(a.scalar_type(), b.scalar_type()));
  return wide == at::kHalf ? at::kFloat : wide;
}

// left @ right over a long reduction: in fp32 and fp64 partial sums are joined every kLongChain terms.
inline Tensor long_product(const Tensor& left, const Tensor& right) {
  const int64_t terms = left.size(1);
  if (terms <= kLongChain || left.scalar_type() == at::kBFloat16) return at::mm(left, right);
  Tensor out = at::mm(left.narrow(1, 0, kLongChain), right.narrow(0, 0, kLongChain));
  for (int64_t k = kLongChain; k < terms; k += kLongChain) {
    const int64_t n = std::min(kLongChain, terms - k);
    out.add_(at::mm(left.narrow(1, k, n), right.narrow(0, k, n)));
  }
  return out;
}

// factor * left @ right, rounded once.
inline Tensor product(const Tensor& left, const Tensor& right, double factor) {
  return at::empty({left.size(0), right.size(1)}, left.options()).addmm_(left, right, 0, factor);
}

// out (+)= factor * left @ right: added to what is there, or written.
inline void expand(Tensor& out, bool add, const Tensor& left, const Tensor& right, double factor) {
  if (out.scalar_type() == left.scalar_type())
    out.addmm_(left, right, add ? 1 : 0, factor);
  else if (add)
    out.add_(product(left, right, factor));
  else
    out.copy_(product(left, right, factor));
}

// y [M, N] holds the bias if `biased`; s [M, R] is written.
inline void forward(const Tensor& x, const Tensor& a, const Tensor& b, double scaling, bool biased, Tensor& y, Tensor& s) {
  const at::ScalarType wide = wide_dtype(x.scalar_type(), a, b);
  const Tensor rank = long_product(x.to(wide), a.to(wide).t());
  expand(y, biased, rank, b.to(wide).t(), scaling);
  s.copy_(rank);
}

// An undefined dx, x or s leaves out its gradient.
inline void backward(const Tensor& dy, const Tensor& x, const Tensor& s, const Tensor& a, const Tensor& b, double scaling,
                     Tensor& dx, Tensor& da, Tensor& db) {
  const at::ScalarType wide = wide_dtype(dy.scalar_type(), a, b);
  const Tensor rows = dy.to(wide);
  if (dx.defined() || x.defined()) {
    const Tensor g = long_product(rows, b.to(wide));
    if (dx.defined()) expand(dx, false, g, a.to(wide), scaling);
    if (x.defined()) da = product(g.t(), x.to(wide), scaling).to(a.scalar_type());
  }
  if (s.defined()) db = product(rows.t(), s.to(wide), scaling).to(b.scalar_type());
}

}  // namespace peft_kernels::few_rows
