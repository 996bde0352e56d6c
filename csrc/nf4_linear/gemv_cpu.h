// y = x @ W.T + bias + addend for 1 or 2 rows of x, as fast as the bytes of W come from memory. Compiled once per instruction
// set.
//
// A thread cuts its rows of W into parts and takes a row of each at a time, chunk by chunk (dot_cpu.h): several streams of bytes
// are on their way at once, the chains of sums of several rows hide each other's latency, and a vector of x is loaded once for
// all of them. However the rows are cut, each one's sum is made in the same order.
#pragma once

#include "finish_cpu.h"
#include "plan_cpu.h"
#include "tiles_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kGemvBlock = 512;   // rows of W whose sums are finished together
constexpr int64_t kGemvAhead = 8192;  // bytes fetched ahead, of all streams together

template <class K>
class Gemv {
  using F = typename DotOf<K>::type;
  using X = typename F::X;
  static constexpr int64_t most_streams_ = 4, run_ = 2 * F::run;  // chunks in a chain, whose scales are made together

  const Nf4Linear f_;
  int64_t chunks_;
  X *x_, *row_;
  float *sums_, *scales_;

 public:
  Gemv(Arena& arena, const Nf4Linear& f)
      : f_(f),
        chunks_(f.K / kDotChunk),
        x_(arena.take<X>(f.threads * f.M * f.K)),
        row_(arena.take<X>(f.threads * f.K)),
        sums_(arena.take<float>(f.threads * f.M * kGemvBlock)),
        scales_(arena.take<float>(f.threads * 2 * most_streams_ * run_)) {}

  // By every thread of a team, each one part of W from end to end.
  void run() const {
    const int id = thread_id();
    const int64_t size = ceil_div(f_.N, team_size()), end = min64(f_.N, (id + 1) * size);
    if (id * size >= end) return;
    X* x = x_ + id * f_.M * f_.K;
    for (int64_t m = 0; m < f_.M; ++m) {  // every thread for itself: less work than waiting for another
      convert(row_ + id * f_.K, static_cast<const typename K::Store*>(f_.left.data) + m * f_.left.row, f_.K);
      pack_row<F>(x, f_.M, m, row_ + id * f_.K, f_.K);
    }
    for (int64_t n = id * size; n < end; n += kGemvBlock) block<kGemvRows>(n, min64(kGemvBlock, end - n), x, id);
  }

 private:
  template <int H>
  void block(int64_t n, int64_t count, const X* x, int id) const {
    if constexpr (H > 1)
      if (f_.M < H) return block<H - 1>(n, count, x, id);
    constexpr int S = F::rows(H);  // streams
    static_assert(S <= most_streams_);
    float *sums = sums_ + id * f_.M * kGemvBlock, *scales = scales_ + id * 2 * most_streams_ * run_;
    memset(sums, 0, H * kGemvBlock * sizeof(float));
    const int64_t part = count / S;
    rows<H, S>(n, part, x, sums, scales);
    rows<H, 1>(n + S * part, count - S * part, x, sums + S * part, scales);
    for (int64_t m = 0; m < H; ++m)
      for (int64_t j = 0; j < count; j += 64)
        nf4_finish<K>(f_, sums + m * kGemvBlock + j, m, n + j, min64(64, count - j), f_.N);
  }

  // sums[h * kGemvBlock + j] += x[h] . W[n + j] for S times `part` rows of W.
  template <int H, int S>
  void rows(int64_t n, int64_t part, const X* x, float* sums, float* made) const {
    const F f(nf4_levels(f_.weight));
    const bool has_scales = has_chunk_scales(f_.weight);
    int64_t at[S];  // a stream's place, in chunks
    PK_UNROLL
    for (int s = 0; s < S; ++s) at[s] = (n + s * part) * chunks_;
    const auto make = [&](int s, int64_t first, int64_t count, int64_t turn) {
      make_chunk_scales(f_.weight, first, count, made + (turn % 2 * S + s) * run_);
    };
    for (int s = 0; s < S && part > 0 && !has_scales; ++s) make(s, at[s], min64(run_, chunks_), 0);
    int64_t turn = 0;
    for (int64_t j = 0; j < part; ++j) {
      for (int64_t c = 0; c < chunks_; c += run_, ++turn) {
        const int64_t here = min64(run_, chunks_ - c), left = chunks_ - c - here;
        const int64_t next = left > 0 ? left : j + 1 < part ? chunks_ : 0;  // what is left of this row, or a row
        const uint8_t* packed[S];
        const float* scales[S];
        PK_UNROLL
        for (int s = 0; s < S; ++s) {
          packed[s] = f_.weight.packed + at[s] * (kDotChunk / 2);
          scales[s] = has_scales ? f_.weight.absmax + at[s] : made + (turn % 2 * S + s) * run_;
          at[s] += here;
          if (!has_scales) make(s, at[s], min64(run_, next), turn + 1);  // made at their use they would be waited for
        }
        dot_tile<F, H, S>(f, packed, scales, kGemvAhead / S, here, x + c * kDotChunk * H, sums + j, kGemvBlock, part);
      }
    }
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
