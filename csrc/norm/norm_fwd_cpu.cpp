// The forward of LayerNorm and RMSNorm on a CPU. This file is compiled once per instruction set (PK_ISA).
//
// What bounds it is one read of x (and residual) and one write of y (and total). A few rows are taken together: each pass over
// them finds them in the cache nearest to the core, and the sums along one row end while those of the next go on. The last pass
// asks for the next rows, as memory would else rest: measured on a Zen 5, 4.2 -> 3.2 ms for [8192, 4096] of bf16. Rows know
// nothing of each other, so the number of threads changes nothing.
#include <math.h>

#include "norm_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

constexpr int64_t kMostRows = 8, kGroupBytes = 16 << 10;

// y, total, mean and rstd of `rows` rows from row m on. `kept` holds their totals where those go past the caches.
template <Way way, class T, class Y>
inline void group_forward(const NormFwd& f, int64_t m, int64_t rows, Lines<T> x, Lines<T> residual, T* kept) {
  // Copies of what f holds: to the compiler every store might change f.
  const int64_t K = f.K;
  const float *weight = f.weight, *bias = f.bias;
  const bool rms = f.rms;
  Lines<T> source = x;
  T* total = nullptr;
  if (residual.first) {
    total = static_cast<T*>(f.total) + m * K;
    source = {way == Way::past ? kept : total, K};
  }
  double sum[kMostRows] = {}, squares[kMostRows];
  float mean[kMostRows], rstd[kMostRows];
  for (int64_t r = 0; r < rows; ++r) {
    const T *x_row = x[r], *residual_row = residual[r];
    if (total) {
      T *total_row = total + r * K, *kept_row = kept + r * K;
      sum_along<1>(K, &sum[r], [=](int64_t k, auto n) {
        const Float both = get(x_row + k, n) + get(residual_row + k, n);
        if (way == Way::past) set(kept_row + k, both, n);
        return Terms<1>{live(set(total_row + k, both, n, way), n)};
      });
    } else if (!rms) {
      sum_along<1>(K, &sum[r], [=](int64_t k, auto n) { return Terms<1>{get(x_row + k, n)}; });
    }
  }
  for (int64_t r = 0; r < rows; ++r) mean[r] = rms ? 0 : static_cast<float>(sum[r] / K);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source[r];
    const float centre = mean[r];
    sum_along<1>(K, &squares[r], [=](int64_t k, auto n) {
      const Float d = live(get(row + k, n) - centre, n);
      return Terms<1>{d * d};
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    rstd[r] = f.rstd[m + r] = static_cast<float>(1 / sqrt(squares[r] / K + f.eps));
    if (!rms) f.mean[m + r] = mean[r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source[r];
    const T *next_x = x[r + rows], *next_residual = total ? residual[r + rows] : next_x;
    const float centre = mean[r], scale = rstd[r];
    Y* y = static_cast<Y*>(f.y) + (m + r) * K;
    along(K, [=](int64_t k, auto n) {
      __builtin_prefetch(next_x + k);
      if (total) __builtin_prefetch(next_residual + k);
      set(y + k, (get(row + k, n) - centre) * scale * get(weight + k, n) + get(bias + k, n), n, way);
    });
  }
}

template <Way way, class T, class Y>
void forward_by(const NormFwd& f) {
  int64_t group = kGroupBytes / (f.K * static_cast<int64_t>(sizeof(T)));
  group = group < 1 ? 1 : min64(group, kMostRows);
  const int64_t groups = ceil_div(f.M, group);
  const int64_t of_x = copied(f.x, group, f.K), of_residual = copied(f.residual, group, f.K);
  const int64_t own_size = round_up(of_x + of_residual + (f.residual.data ? group * f.K : 0), 64);
  const int threads = team_for(f.threads, f.M, f.K);
  Workspace space(threads * own_size * sizeof(T));
#pragma omp parallel num_threads(threads)
  {
    T* own = static_cast<T*>(space.memory) + thread_id() * own_size;
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t m = i * group, rows = min64(group, f.M - m);
      const Lines<T> x = lines(f.x, m, rows, f.K, own), residual = lines(f.residual, m, rows, f.K, own + of_x);
      group_forward<way, T, Y>(f, m, rows, x, residual, own + of_x + of_residual);
    }
    close(way);
  }
}

template <class T, class Y>
void forward_as(const NormFwd& f) {
  if (goes_past_cache(f.y, f.M, f.K * static_cast<int64_t>(sizeof(Y)))) return forward_by<Way::past, T, Y>(f);
  forward_by<Way::cached, T, Y>(f);
}

template <class T>
void forward_of(const NormFwd& f) {
  if (f.out_dtype == f.dtype) return forward_as<T, T>(f);
  forward_as<T, float>(f);
}

}  // namespace

void norm_forward(const NormFwd& f) {
  switch (f.dtype) {
    case Dtype::f32: return forward_of<float>(f);
    case Dtype::bf16: return forward_of<bf16>(f);
    case Dtype::f16: return forward_of<f16>(f);
    case Dtype::f64: return;  // the caller's own
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
