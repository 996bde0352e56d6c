// y = x @ W.T + bias + addend for more than a few rows of x: W is decoded first, a strip at a time, and multiplied from there.
// Also where rows of W have any length and blocks end anywhere. Compiled once per instruction set.
//
// Sums of a stripe of rows of W are finished together, run by run of K. While the packed rows of x fit the second cache, a
// strip is the few rows of W of one tile: it stays in the first, and x streams past it. From there on a strip is the whole
// stripe, in the second cache. The bytes of the strip that comes next are fetched meanwhile. No call holds more of W than a
// strip per thread.
#pragma once

#include "finish_cpu.h"
#include "plan_cpu.h"
#include "team_cpu.h"
#include "tiles_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kStripe = 64;  // rows of W whose sums are finished together
constexpr int64_t kForwardBytes = int64_t{4} << 20;  // of packed x at a time, or kForwardRows rows where that is more
constexpr int64_t kForwardRows = 96;

template <class K>
class ByStrips {
  using F = typename DotOf<K>::type;
  using X = typename F::X;
  static constexpr int R_ = F::strip_rows;
  static_assert(kStripe % R_ == 0, "sums of rows that do not exist stay in their row of sums");

  const Nf4Linear& f_;
  bool chunked_;
  int64_t chunks_, run_, most_, stripe_, strip_rows_;  // run_: chunks
  X* x_;
  Tasks stripes_;
  int64_t own_bytes_;
  char* own_;

 public:
  ByStrips(Arena& arena, const Nf4Linear& f)
      : f_(f),
        chunked_(in_chunks(f)),
        chunks_(ceil_div(f.K > 0 ? f.K : 1, kDotChunk)),
        run_(round_up(ceil_div(chunks_, ceil_div(chunks_, F::run)), 2)),
        most_(ceil_div(f.M, ceil_div(f.M, most_rows(chunks_ * kDotChunk * sizeof(X))))),
        stripe_(min64(kStripe, round_up(ceil_div(f.N, f.threads), R_))),
        strip_rows_(most_ * chunks_ * kDotChunk * static_cast<int64_t>(sizeof(X)) <= kShortStripBytes ? R_ : kStripe),
        x_(arena.take<X>(most_ * chunks_ * kDotChunk)),
        stripes_(arena, ceil_div(f.N, stripe_), f.threads) {
    Arena own{nullptr};
    take_own(own);
    own_bytes_ = round_up(own.used, kPage) + kPage;
    own_ = arena.take<char>(f.threads * own_bytes_ + kPage);
  }

  // By every thread of a team.
  void run() const {
    const int id = thread_id();
    Arena arena{reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(own_), kPage)) + id * own_bytes_};
    const Own own = take_own(arena);
    for (int64_t m0 = 0; m0 < f_.M; m0 += most_) {
      const int64_t rows = min64(most_, f_.M - m0);
      pack_rows_of_x(m0, rows, own.row, id);
      stripes_.begin(id);
#pragma omp barrier
      stripes(m0, rows, own);
#pragma omp barrier
    }
  }

 private:
  // What a thread writes alone: pages away from another's, or a core would fetch ahead what the other is about to write.
  struct Own {
    X *row, *strip;
    float *sums, *scales;
  };
  Own take_own(Arena& arena) const {
    return {arena.take<X>(chunks_ * kDotChunk), arena.take<X>(strip_rows_ * run_ * kDotChunk),
            arena.take<float>(most_ * kStripe), arena.take<float>(kStripe * chunks_)};
  }

  static int64_t most_rows(int64_t row_bytes) {
    const int64_t fit = kForwardBytes / row_bytes;
    return fit > kForwardRows ? fit : kForwardRows;
  }

  // Groups of as many rows as each other, or one more: how many, and where group g begins.
  int64_t groups_of(int64_t rows) const { return ceil_div(rows, F::strip_height); }
  static int64_t group_start(int64_t rows, int64_t groups, int64_t g) {
    const int64_t more = rows % groups;
    return g * (rows / groups) + (g < more ? g : more);
  }
  // Where a run of a group begins: the runs of all groups lie together, one behind the other.
  X* group_at(int64_t rows, int64_t start, int64_t c) const {
    return x_ + (rows * c + start * min64(run_, chunks_ - c)) * kDotChunk;
  }

  void pack_rows_of_x(int64_t m0, int64_t rows, X* row, int id) const {
    const int64_t groups = groups_of(rows), padded = chunks_ * kDotChunk;
    for (int64_t g = 0, i = 0; g < groups; ++g) {
      const int64_t start = group_start(rows, groups, g), height = group_start(rows, groups, g + 1) - start;
      for (int64_t h = 0; h < height; ++h, ++i) {
        if (i % team_size() != id) continue;
        const auto* from = static_cast<const typename K::Store*>(f_.left.data) + (m0 + start + h) * f_.left.row;
        const X* whole = row;
        if (sizeof(*from) == sizeof(X) && f_.K == padded) {
          whole = reinterpret_cast<const X*>(from);
        } else {
          convert(row, from, f_.K);
          for (int64_t k = f_.K; k < padded; ++k) row[k] = X{};
        }
        for (int64_t c = 0; c < chunks_; c += run_)
          pack_row<F>(group_at(rows, start, c), height, h, whole + c * kDotChunk, min64(run_, chunks_ - c) * kDotChunk);
      }
    }
  }

  void finish(float* sums, int64_t m0, int64_t rows, int64_t n0, int64_t count) const {
    for (int64_t m = 0; m < rows; ++m) nf4_finish<K>(f_, sums + m * kStripe, m0 + m, n0, count, f_.N);
  }

  // The next stripe is taken early, to be fetched. Who computes one does not change its bits.
  void stripes(int64_t m0, int64_t rows, const Own& own) const {
    const int id = thread_id();
    for (int64_t task = stripes_.take(id), later; task < stripes_.count(); task = later) {
      memset(own.sums, 0, rows * kStripe * sizeof(float));
      const int64_t n0 = task * stripe_, count = min64(stripe_, f_.N - n0);
      later = stripes_.count();
      for (int64_t c = 0; c < chunks_; c += run_) {
        const int64_t here = min64(run_, chunks_ - c);
        for (int64_t n = 0; n < count; n += strip_rows_) {
          const int64_t live = min64(strip_rows_, count - n);
          // What comes next: the next rows, the next run, or the next stripe.
          Fetcher fetcher;
          if (n + live < count) {
            fetcher = bytes_of(n0 + n + live, min64(strip_rows_, count - n - live), c);
          } else if (c + here < chunks_) {
            fetcher = bytes_of(n0, min64(strip_rows_, count), c + here);
          } else {
            later = stripes_.take(id);
            if (later < stripes_.count()) fetcher = bytes_of(later * stripe_, min64(strip_rows_, f_.N - later * stripe_), 0);
          }
          // All of it while this strip is multiplied; a short one is decoded for as long, and must fetch then too.
          const int64_t times = groups_of(rows) * ceil_div(live, R_) * (here / 2);
          Fetcher none, &early = strip_rows_ > R_ ? none : fetcher;
          fetcher.share = share_of(fetcher, strip_rows_ > R_ ? times : times + here / 2);
          decode_strip(n0, n, live, c, here, own, early);
          multiply_strip(live, c, here, rows, own.strip, own.sums + n, fetcher);
        }
      }
      finish(own.sums, m0, rows, n0, count);
    }
  }

  static int64_t share_of(const Fetcher& fetcher, int64_t times) {
    return ceil_div(fetcher.lines * fetcher.rows, times > 0 ? times : 1);
  }

  Fetcher bytes_of(int64_t n, int64_t rows, int64_t c) const {
    const int64_t first = (n * f_.K + c * kDotChunk) / 2;
    if (c == 0 && chunked_) {
      const int64_t size = f_.weight.absmax ? 4 : 1, shift = __builtin_ctzll(f_.weight.blocksize);
      const auto* scales = f_.weight.absmax ? reinterpret_cast<const uint8_t*>(f_.weight.absmax) : f_.weight.absmax8;
      const int64_t from = (n * f_.K >> shift) * size, bytes = (rows * f_.K >> shift) * size;
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(scales + from + i);
    }
    return {f_.weight.packed + first, f_.K / 2, rows, ceil_div(min64(run_, chunks_ - c) * (kDotChunk / 2), 64)};
  }

  // Run [c, c + here) of rows [n0 + n, n0 + n + live).
  void decode_strip(int64_t n0, int64_t n, int64_t live, int64_t c, int64_t here, const Own& own, Fetcher& fetcher) const {
    X* to = own.strip;
    for (const int64_t end = n + live; n < end; n += R_, to += R_ * here * kDotChunk)
      if (chunked_)
        decode_chunks(n0, n, min64(R_, end - n), c, here, to, own, fetcher);
      else
        decode_any(n0 + n, min64(R_, end - n), c, here, to, own);
  }

  // Of rows that do not exist the last one stands for.
  void decode_chunks(int64_t n0, int64_t n, int64_t live, int64_t c, int64_t here, X* to, const Own& own,
                     Fetcher& fetcher) const {
    const bool has_scales = has_chunk_scales(f_.weight);
    float* const made = own.scales + n * chunks_;
    const float* const scales = has_scales ? f_.weight.absmax + (n0 + n) * chunks_ : made;
    if (!has_scales && c == 0) make_chunk_scales(f_.weight, (n0 + n) * chunks_, live * chunks_, made);
    const uint8_t* packed[R_];
    const float* scale[R_];
    PK_UNROLL
    for (int r = 0; r < R_; ++r) {
      const int64_t row = min64(r, live - 1) * chunks_ + c;
      packed[r] = f_.weight.packed + ((n0 + n) * chunks_ + row) * (kDotChunk / 2);
      scale[r] = scales + row;
    }
    decode_tile<F, R_>(F(nf4_levels(f_.weight)), packed, scale, here, to, fetcher);
  }

  // Rows of any length, blocks that end anywhere: one row after the other, in its plain order first.
  void decode_any(int64_t n, int64_t live, int64_t c, int64_t here, X* to, const Own& own) const {
    X* const row = own.row;
    const int64_t filled = min64(here * kDotChunk, f_.K - c * kDotChunk);
    for (int64_t k = filled; k < here * kDotChunk; ++k) row[k] = X{};
    for (int64_t r = 0; r < R_; ++r) {
      if (r < live) nf4_decode(f_.weight, (n + r) * f_.K + c * kDotChunk, filled, row);
      pack_row<F>(to, R_, r, row, here * kDotChunk);
    }
  }

  void multiply_strip(int64_t live, int64_t c, int64_t here, int64_t rows, const X* strip, float* sums,
                      Fetcher& fetcher) const {
    const int64_t groups = groups_of(rows), tiles = ceil_div(live, R_);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t start = group_start(rows, groups, g), height = group_start(rows, groups, g + 1) - start;
      for (int64_t t = 0; t < tiles; ++t)
        multiply_rows<F::strip_height>(strip + t * R_ * here * kDotChunk, here, group_at(rows, start, c), height,
                                       sums + start * kStripe + t * R_, fetcher);
    }
  }

  // A tile for a height known at run time, at most H.
  template <int H>
  static void multiply_rows(const X* w, int64_t chunks, const X* x, int64_t height, float* sums, Fetcher& fetcher) {
    if (height == H) return multiply_tile<F, H, R_>(w, chunks, x, sums, kStripe, fetcher);
    if constexpr (H > 1) multiply_rows<H - 1>(w, chunks, x, height, sums, fetcher);
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
