// y = x @ W.T + bias + addend by rows of W, a stripe of them at a time. Compiled once per instruction set.
//
// A few rows of x decode W on their way (dot_cpu.h): one pass over the bytes from memory, and nothing of W is written. More
// rows have it decoded first (strips_cpu.h).
#pragma once

#include "dot_cpu.h"
#include "finish_cpu.h"
#include "plan_cpu.h"
#include "strips_cpu.h"
#include "team_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kScalesAhead = 4;  // rows of W
constexpr int64_t kWholeTiles = 12, kPackedStripe = 60;  // rows of W: tiles of 1, 2, 3 and 4; whose sums are finished together

template <class K>
class OnTheWay {
  using F = typename DotOf<K>::type;
  using X = typename F::X;
  static constexpr int64_t sums_row_ = kPackedStripe + 4;  // the last tile may end beyond the stripe

  const Nf4Linear& f_;
  int64_t chunks_, stripe_, sums_ld_, scales_ld_;
  X *x_, *row_;
  float *sums_, *scales_;
  Tasks stripes_;

 public:
  static constexpr int64_t most = F::height;  // rows of x

  // Threads write sums and scales pages apart: a core fetches ahead to the end of a page what another may be about to write.
  OnTheWay(Arena& arena, const Nf4Linear& f)
      : f_(f),
        chunks_(f.K / kDotChunk),
        stripe_(min64(kPackedStripe, round_up(ceil_div(f.N, f.threads), kWholeTiles))),
        sums_ld_(f.M * sums_row_ + kPage / 4),
        scales_ld_(kPackedStripe * chunks_ + kPage / 4),
        x_(arena.take<X>(f.M * f.K)),
        row_(arena.take<X>(f.threads * f.K)),
        sums_(arena.take<float>(f.threads * sums_ld_)),
        scales_(arena.take<float>(f.threads * scales_ld_)),
        stripes_(arena, ceil_div(f.N, stripe_), f.threads) {}

  // By every thread of a team.
  void run() const {
    const int id = thread_id();
    stripes_.begin(id);
    for (int64_t m = id; m < f_.M; m += team_size()) {
      convert(row_ + id * f_.K, static_cast<const typename K::Store*>(f_.left.data) + m * f_.left.row, f_.K);
      pack_row<F>(x_, f_.M, m, row_ + id * f_.K, f_.K);
    }
#pragma omp barrier
    for (int64_t task; (task = stripes_.take(id)) < stripes_.count();)
      stripe<F::height>(task * stripe_, min64(stripe_, f_.N - task * stripe_), id);
  }

 private:
  template <int H>
  void stripe(int64_t n0, int64_t count, int id) const {
    if constexpr (H > 1)
      if (f_.M < H) return stripe<H - 1>(n0, count, id);
    constexpr int R = F::rows(H);
    static_assert(kWholeTiles % R == 0 && kPackedStripe % kWholeTiles == 0 && R <= 4);
    const F f(nf4_levels(f_.weight));
    const bool has_scales = has_chunk_scales(f_.weight);
    float* const made = scales_ + id * scales_ld_;
    const ScaledChunks<> stored{f_.weight.packed + n0 * (f_.K / 2), has_scales ? f_.weight.absmax + n0 * chunks_ : made};
    int64_t ready = has_scales ? count : 0;  // rows whose scales are there
    float* sums = sums_ + id * sums_ld_;
    memset(sums, 0, H * sums_row_ * sizeof(float));
    for (int64_t n = 0; n < count; n += R) {
      // A row's scales are made before those of the rows ahead of it are used: made just in time they would be waited for, and
      // made for all rows at once, no bytes would be fetched meanwhile.
      const int64_t until = min64(count, n + R + kScalesAhead);
      if (ready < until) make_chunk_scales(f_.weight, (n0 + ready) * chunks_, (until - ready) * chunks_, made + ready * chunks_);
      ready = ready < until ? until : ready;
      constexpr int64_t run = 2 * F::run;
      for (int64_t c = 0; c < chunks_; c += run) {
        int64_t at[R];
        PK_UNROLL
        for (int r = 0; r < R; ++r) at[r] = min64(n + r, count - 1) * chunks_ + c;  // the last row stands for those beyond it
        dot_tile<F, H, R>(f, stored, at, R * (f_.K / 2), min64(run, chunks_ - c), x_ + c * kDotChunk * H, sums + n, sums_row_);
      }
    }
    for (int64_t m = 0; m < H; ++m) nf4_finish<K>(f_, sums + m * sums_row_, m, n0, count, f_.N);
  }
};

template <class K>
static void by_stripes(const Nf4Linear& f) {
  if (in_chunks(f) && f.M <= OnTheWay<K>::most)
    by_team<OnTheWay<K>>(f);
  else
    by_team<ByStrips<K>>(f);
}

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
