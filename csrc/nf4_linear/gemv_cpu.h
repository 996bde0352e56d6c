// y = x @ W.T + bias + addend for 1 or 2 rows of x, as fast as the bytes of W come from memory. Compiled once per instruction
// set.
//
// A thread cuts its rows of W into parts and takes a row of each at a time, chunk by chunk (dot_cpu.h): several streams of bytes
// are on their way at once, the chains of sums of several rows hide each other's latency, and a vector of x is loaded once for
// all of them. However the rows are cut, each one's sum is made in the same order.
#pragma once

#include "../common/tasks_cpu.h"
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
  static constexpr int64_t most_streams_ = 4, run_ = 2 * F::run;  // chunks in a chain
  static_assert(run_ <= kNestedBlock, "a chain begins in one group and ends in it or in the next");

  const Nf4Linear f_;
  int64_t chunks_;
  X *x_, *row_;
  float *sums_, *tables_;

 public:
  Gemv(Arena& arena, const Nf4Linear& f)
      : f_(f),
        chunks_(f.K / kDotChunk),
        x_(arena.take<X>(f.threads * f.M * f.K)),
        row_(arena.take<X>(f.threads * f.K)),
        sums_(arena.take<float>(f.threads * f.M * kGemvBlock)),
        tables_(arena.take<float>(f.threads * most_streams_ * kRowTables)) {}

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
    float *sums = sums_ + id * f_.M * kGemvBlock, *tables = tables_ + id * most_streams_ * kRowTables;
    memset(sums, 0, H * kGemvBlock * sizeof(float));
    const int64_t part = count / S;
    rows<H, S>(n, part, x, sums, tables);
    rows<H, 1>(n + S * part, count - S * part, x, sums + S * part, tables);
    for (int64_t m = 0; m < H; ++m)
      for (int64_t j = 0; j < count; j += 64)
        nf4_finish<K>(f_, sums + m * kGemvBlock + j, m, n + j, min64(64, count - j), f_.N);
  }

  // sums[h * kGemvBlock + j] += x[h] . W[n + j] for S times `part` rows of W.
  template <int H, int S>
  void rows(int64_t n, int64_t part, const X* x, float* sums, float* tables) const {
    return f_.weight.blocksize > kDotChunk ? rows_of<H, S, true>(n, part, x, sums, tables)
                                           : rows_of<H, S, false>(n, part, x, sums, tables);
  }

  // Shared: whether several chunks have one scale.
  template <int H, int S, bool Shared>
  void rows_of(int64_t n, int64_t part, const X* x, float* sums, float* tables) const {
    const Nf4Weight& w = f_.weight;
    const int shift = Shared ? __builtin_ctzll(w.blocksize / kDotChunk) : 0;
    if (w.absmax) {
      const ScaledChunks<Shared> stored{w.packed, w.absmax, shift};
      products<H, S>(stored, n, part, x, sums, [](int, int64_t, int64_t) {});
    } else {
      const CodedChunks<Shared> stored{w.packed, w.absmax8, tables, shift};
      products<H, S>(stored, n, part, x, sums, CodeTables<S>(w, shift, tables));
    }
  }

  // prepare(s, begin, end) is called before stream s comes to these chunks.
  template <int H, int S, class Stored, class Prepare>
  void products(const Stored& stored, int64_t n, int64_t part, const X* x, float* sums, Prepare prepare) const {
    const F f(nf4_levels(f_.weight));
    int64_t at[S];  // a stream's place, in chunks
    PK_UNROLL
    for (int s = 0; s < S; ++s) at[s] = (n + s * part) * chunks_;
    for (int64_t j = 0; j < part; ++j) {
      for (int64_t c = 0; c < chunks_; c += run_) {
        const int64_t here = min64(run_, chunks_ - c);
        PK_UNROLL
        for (int s = 0; s < S; ++s) prepare(s, at[s], at[s] + here);
        dot_tile<F, H, S>(f, stored, at, kGemvAhead / S, here, x + c * kDotChunk * H, sums + j, kGemvBlock, part);
        PK_UNROLL
        for (int s = 0; s < S; ++s) at[s] += here;
      }
    }
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
