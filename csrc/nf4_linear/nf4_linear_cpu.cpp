// The linear layer over a 4-bit weight on a CPU. This file is compiled once per instruction set (PK_ISA).
#include "nf4_linear.h"

#include "../common/gemm_cpu.h"
#include "few_rows_bwd_cpu.h"
#include "finish_cpu.h"
#include "forward_cpu.h"
#include "gemv_cpu.h"
#include "panels_cpu.h"
#include "team_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

// out = left @ right + bias + addend, W decoded into packed panels.
template <class K>
static void by_panels(const Nf4Linear& f, bool transposed) {
  using Acc = typename K::Acc;
  const int64_t D = transposed ? f.K : f.N, J = transposed ? f.N : f.K;
  const LeftRows<K> left(f.left, D);
  const Nf4Right right{f.weight, f.K, transposed};
  Arena shared_size{nullptr}, own_size{nullptr};
  GemmShared<K>(shared_size, left.steps(), J, f.threads);
  GemmOwn<K>(own_size, left);
  Workspace space(shared_size.used + f.threads * own_size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const GemmShared<K> shared(arena, left.steps(), J, f.threads);
#pragma omp parallel num_threads(f.threads)
  {
    Arena mine{static_cast<char*>(space.memory) + shared_size.used + thread_id() * own_size.used};
    const GemmOwn<K> own(mine, left);
    gemm<K>(
        left, right, f.M, J, shared, own, [](int64_t, int64_t) {},
        [](Acc* sums, int64_t, int64_t rows, int64_t, int64_t) { memset(sums, 0, rows * K::panel * sizeof(Acc)); },
        [&](Acc* sums, int64_t m, int64_t rows, int64_t j, int64_t live) {
          for (int64_t i = 0; i < rows; ++i) nf4_finish<K>(f, sums + i * K::panel, m + i, j, live, J);
        });
  }
}

template <class K>
static void forward(const Nf4Linear& f) {
#if defined(__AVX2__)
  if constexpr (sizeof(typename K::Acc) == sizeof(float))
    return in_chunks(f) && f.M <= kGemvRows ? by_team<Gemv<K>>(f) : by_stripes<K>(f);
#endif
  by_panels<K>(f, true);
}

template <class K>
static void backward(const Nf4Linear& f) {
#if defined(__AVX2__)
  if constexpr (sizeof(typename K::Acc) == sizeof(float))
    if (in_chunks(f) && f.M <= (K::pair == 2 ? kFewRowsDot : kFewRowsFma)) return by_team<FewRowsBackward<K>>(f);
#endif
  by_panels<K>(f, false);
}

// `run` for the kind of numbers of the product, as a value of its type.
template <class Run>
static void dispatch(const Nf4Linear& f, const Run& run) {
  using Exact = Kind<Fma<float>, float>;
#if defined(__AVX512BF16__)
  using Rounded = Kind<Dot2, float>;
  using BF16 = Kind<Dot2, bf16>;
#else
  using Rounded = Exact;
  using BF16 = Kind<Fma<float>, bf16>;
#endif
  switch (f.dtype) {
    case Dtype::f32: return f.by_bf16 ? run(Rounded{}) : run(Exact{});
    case Dtype::f64: return run(Kind<Fma<double>, double>{});
    case Dtype::bf16: return run(BF16{});
    case Dtype::f16: return run(Kind<Fma<float>, f16>{});
  }
}

static void dispatch_forward(const Nf4Linear& f) {
  dispatch(f, [&](auto kind) { forward<decltype(kind)>(f); });
}

static void dispatch_backward(const Nf4Linear& f) {
  dispatch(f, [&](auto kind) { backward<decltype(kind)>(f); });
}

extern const Nf4LinearKernels nf4_linear_table;
const Nf4LinearKernels nf4_linear_table{dispatch_forward, dispatch_backward};

}  // namespace PK_ISA
}  // namespace peft_kernels
