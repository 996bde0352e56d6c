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

constexpr int64_t kPackedStripe = 60;  // rows of W whose sums are finished together
constexpr int64_t kScalesAhead = 2;    // rows of W

template <class K>
class OnTheWay {
  using F = typename DotOf<K>::type;
  using X = typename F::X;
  static_assert(kDotChunk % (2 * F::lanes) == 0, "a chunk is a whole number of units");

  const Nf4Linear& f_;
  int64_t chunks_, x_ld_, sums_ld_, scales_ld_;
  X *x_, *row_;
  float *sums_, *scales_;

 public:
  static constexpr int64_t most = F::tall < kPackedRows ? F::tall : kPackedRows;  // rows of x

  // Threads write pages apart: a core fetches ahead to the end of a page what another may be about to write.
  OnTheWay(Arena& arena, const Nf4Linear& f)
      : f_(f),
        chunks_(f.K / kDotChunk),
        x_ld_(f.K + 64),  // off the power of two that would share cache sets
        sums_ld_(f.M * kStripe + kPage / 4),
        scales_ld_(kPackedStripe * chunks_ + kPage / 4),
        x_(arena.take<X>(f.M * x_ld_)),
        row_(arena.take<X>(f.threads * f.K)),
        sums_(arena.take<float>(f.threads * sums_ld_)),
        scales_(arena.take<float>(f.threads * scales_ld_)) {}

  // By every thread of a team.
  void run() const {
    const int id = thread_id();
    for (int64_t m = id; m < f_.M; m += team_size()) {
      convert(row_ + id * f_.K, static_cast<const typename K::Store*>(f_.left.data) + m * f_.left.row, f_.K);
      order_for_codes<F>(x_ + m * x_ld_, row_ + id * f_.K, f_.K);
    }
#pragma omp barrier
    // Each thread one part of W from end to end: one stream of bytes. Of whole tiles, as every stripe is: a row's sum is made in
    // another order beside others than alone, and which rows of W are left over may not depend on the number of threads.
    constexpr int64_t tiles = F::rows * F::tall_rows;
    static_assert(kPackedStripe % tiles == 0, "a stripe is a whole number of tiles");
    const int64_t size = round_up(ceil_div(f_.N, team_size()), tiles), end = min64(f_.N, (id + 1) * size);
    for (int64_t n = id * size; n < end; n += kPackedStripe) stripe(n, min64(kPackedStripe, end - n), id);
  }

 private:
  void stripe(int64_t n0, int64_t count, int id) const {
    const F f(nf4_levels(f_.weight));
    const bool has_scales = has_chunk_scales(f_.weight);
    float* const made = scales_ + id * scales_ld_;
    const float* scales = has_scales ? f_.weight.absmax + n0 * chunks_ : made;
    int64_t ready = has_scales ? count : 0;  // rows whose scales are there
    // A row's scales are made before those of the rows ahead of it are used: made just in time they would be waited for, and
    // made for all rows at once, no bytes would be fetched meanwhile.
    const auto prepare = [&](int64_t rows) {
      const int64_t until = min64(count, rows + kScalesAhead);
      if (ready < until)
        make_chunk_scales(f_.weight, (n0 + ready) * chunks_, (until - ready) * chunks_, made + ready * chunks_);
      ready = ready < until ? until : ready;
    };
    float* sums = sums_ + id * sums_ld_;
    memset(sums, 0, f_.M * kStripe * sizeof(float));
    int64_t n = 0;
    if (f_.M > F::height)
      for (; n + F::tall_rows <= count; n += F::tall_rows)
        prepare(n + F::tall_rows), rows<F::tall, F::tall_rows>(f, n0 + n, scales + n * chunks_, sums + n);
    else
      for (; n + F::rows <= count; n += F::rows)
        prepare(n + F::rows), rows<F::height, F::rows>(f, n0 + n, scales + n * chunks_, sums + n);
    for (; n < count; ++n) prepare(n + 1), rows<F::tall, 1>(f, n0 + n, scales + n * chunks_, sums + n);
    for (int64_t m = 0; m < f_.M; ++m) nf4_finish<K>(f_, sums + m * kStripe, m, n0, count, f_.N);
  }

  // R rows of W from n on with all rows of x, at most H.
  template <int H, int R>
  void rows(const F& f, int64_t n, const float* scales, float* sums) const {
    const uint8_t* packed = f_.weight.packed + n * (f_.K / 2);
    constexpr int64_t run = 2 * F::run;
    for (int64_t c = 0; c < chunks_; c += run) {
      const PackedRows<F> w{f, packed + c * (kDotChunk / 2), scales + c, f_.K / 2, chunks_};
      dot_rows<F, H, R>(w, min64(run, chunks_ - c), x_ + c * kDotChunk, x_ld_, f_.M, sums, kStripe);
    }
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
