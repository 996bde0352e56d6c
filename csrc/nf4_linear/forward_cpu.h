// y = x @ W.T + bias + addend by rows of W, a stripe of them at a time. Compiled once per instruction set.
//
// For a few rows of x each group of them decodes W on its way (dot_cpu.h): one pass over the bytes from memory. For more, a run
// of a stripe is decoded once into the second cache, in its plain order, and all rows of x are multiplied with it; that also
// takes rows of W of any length, and blocks that end anywhere. No call holds more of W than one run of a stripe per thread.
#pragma once

#include "dot_cpu.h"
#include "finish_cpu.h"
#include "plan_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kStripe = 64;        // rows of W whose sums are finished together
constexpr int64_t kForwardRows = 512;  // rows of x at a time: the sums of a stripe and a copy of x stay small

// Chunks must begin on bytes and lie in one block each, to be decoded on the way.
static inline bool in_chunks(const Nf4Linear& f) {
  return f.K % kDotChunk == 0 && f.weight.blocksize >= kDotChunk;
}

template <class K>
class ByStripes {
  using F = typename DotOf<K>::type;
  using X = typename F::X;
  static constexpr int64_t run_ = F::run * kDotChunk;        // elements
  static constexpr int64_t strip_ld_ = run_ + 64 / sizeof(X);  // off the power of two that would share cache sets
  static_assert(F::lanes * F::vectors == kDotChunk, "a chunk is a whole number of vectors");

  const Nf4Linear& f_;
  bool packed_, in_place_;
  int64_t most_, stripe_, stripes_, chunks_, x_ld_;
  X *x_, *row_, *strip_;
  float *sums_, *scales_;
  int64_t* next_;

 public:
  ByStripes(Arena& arena, const Nf4Linear& f)
      : f_(f),
        packed_(in_chunks(f) && f.M <= (K::pair == 2 ? kPackedRowsDot : kPackedRowsFma)),
        in_place_(!packed_ && sizeof(typename K::Store) == sizeof(X) && f.K % kDotChunk == 0),
        most_(min64(f.M, kForwardRows)),
        stripe_(min64(kStripe, round_up(ceil_div(f.N, f.threads), 4))),
        stripes_(ceil_div(f.N, stripe_)),
        chunks_(ceil_div(f.K, kDotChunk)),
        x_ld_(in_place_ ? f.left.row : chunks_ * kDotChunk + 64),
        x_(in_place_ ? nullptr : arena.take<X>(most_ * x_ld_)),
        row_(arena.take<X>(packed_ ? f.threads * f.K : 0)),
        strip_(arena.take<X>(packed_ ? 0 : f.threads * kStripe * strip_ld_)),
        sums_(arena.take<float>(f.threads * most_ * kStripe)),
        scales_(arena.take<float>(packed_ ? f.threads * F::rows * chunks_ : 0)),
        next_(arena.take<int64_t>(1)) {}

  // By every thread of a team.
  void run() const {
    const int id = thread_id();
    for (int64_t m0 = 0; m0 < f_.M; m0 += kForwardRows) {
      const int64_t rows = min64(kForwardRows, f_.M - m0);
      if (!in_place_) copy_rows(m0, rows, id);
      if (id == 0) *next_ = 0;
#pragma omp barrier
      if (packed_) {  // each thread one part of W from end to end: one stream of bytes
        const int64_t size = round_up(ceil_div(f_.N, team_size()), 4), end = min64(f_.N, (id + 1) * size);
        for (int64_t n = id * size; n < end; n += kStripe) packed_stripe(n, min64(kStripe, end - n), id);
      } else {
        for (int64_t task; (task = __atomic_fetch_add(next_, 1, __ATOMIC_RELAXED)) < stripes_;)
          decoded_stripe(task * stripe_, min64(stripe_, f_.N - task * stripe_), m0, rows, id);
      }
#pragma omp barrier
    }
  }

 private:
  void copy_rows(int64_t m0, int64_t rows, int id) const {
    for (int64_t m = id; m < rows; m += team_size()) {
      const auto* from = static_cast<const typename K::Store*>(f_.left.data) + (m0 + m) * f_.left.row;
      X* to = x_ + m * x_ld_;
      convert(packed_ ? row_ + id * f_.K : to, from, f_.K);
      if (packed_)
        order_for_codes<F>(to, row_ + id * f_.K, f_.K);
      else
        for (int64_t k = f_.K; k < chunks_ * kDotChunk; ++k) to[k] = X{};
    }
  }

  void finish(float* sums, int64_t m0, int64_t rows, int64_t n0, int64_t count) const {
    for (int64_t m = 0; m < rows; ++m) nf4_finish<K>(f_, sums + m * kStripe, m0 + m, n0, count, f_.N);
  }

  void decoded_stripe(int64_t n0, int64_t count, int64_t m0, int64_t rows, int id) const {
    float* sums = sums_ + id * most_ * kStripe;
    X* strip = strip_ + id * kStripe * strip_ld_;
    memset(sums, 0, rows * kStripe * sizeof(float));
    const X* x = in_place_ ? static_cast<const X*>(f_.left.data) + m0 * x_ld_ : x_;
    for (int64_t k = 0; k < f_.K; k += run_) {
      const int64_t here = min64(run_, f_.K - k), chunks = ceil_div(here, kDotChunk);
      for (int64_t n = 0; n < count; ++n) {
        X* line = strip + n * strip_ld_;
        if (n0 + n + 1 < f_.N) fetch(f_.weight.packed + ((n0 + n + 1) * f_.K + k) / 2, here / 2);
        nf4_decode(f_.weight, (n0 + n) * f_.K + k, here, line);
        for (int64_t i = here; i < chunks * kDotChunk; ++i) line[i] = X{};
      }
      for (int64_t m = 0; m < rows; m += F::strip_height) {
        const int64_t height = min64(F::strip_height, rows - m);
        int64_t n = 0;
        for (; n + F::strip_rows <= count; n += F::strip_rows)
          dot_rows<F, F::strip_height, F::strip_rows>(StripRows<F>{strip + n * strip_ld_, strip_ld_}, chunks, x + m * x_ld_ + k,
                                                      x_ld_, height, sums + m * kStripe + n, kStripe);
        for (; n < count; ++n)
          dot_rows<F, F::strip_height, 1>(StripRows<F>{strip + n * strip_ld_, strip_ld_}, chunks, x + m * x_ld_ + k, x_ld_,
                                          height, sums + m * kStripe + n, kStripe);
      }
    }
    finish(sums, m0, rows, n0, count);
  }

  static void fetch(const uint8_t* bytes, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(bytes + i);
  }

  void packed_stripe(int64_t n0, int64_t count, int id) const {
    const F f(nf4_levels(f_.weight));
    float* sums = sums_ + id * most_ * kStripe;
    memset(sums, 0, f_.M * kStripe * sizeof(float));
    int64_t n = 0;
    if (f_.M > 1)
      for (; n + F::rows <= count; n += F::rows) packed_rows<F::rows>(f, n0 + n, sums + n, id);
    for (; n < count; ++n) packed_rows<1>(f, n0 + n, sums + n, id);
    finish(sums, 0, f_.M, n0, count);
  }

  template <int R>
  void packed_rows(const F& f, int64_t n, float* sums, int id) const {
    const uint8_t* packed = f_.weight.packed + n * (f_.K / 2);
    const float* scales = scales_of(n, R, id);
    const int64_t groups = ceil_div(f_.M, F::height), height = ceil_div(f_.M, groups);
    constexpr int64_t run = 2 * F::run;
    for (int64_t c = 0; c < chunks_; c += run) {
      const PackedRows<F> w{f, packed + c * (kDotChunk / 2), scales + c, f_.K / 2, chunks_};
      for (int64_t m = 0; m < f_.M; m += height)
        dot_rows<F, F::height, R>(w, min64(run, chunks_ - c), x_ + m * x_ld_ + c * kDotChunk, x_ld_, min64(height, f_.M - m),
                                  sums + m * kStripe, kStripe);
    }
  }

  // The scale of each chunk of `count` rows of W from n on: in their place where each chunk is a block.
  const float* scales_of(int64_t n, int64_t count, int id) const {
    const Nf4Weight w = f_.weight;
    if (w.absmax && w.blocksize == kDotChunk) return w.absmax + n * chunks_;
    float* scales = scales_ + id * F::rows * chunks_;
    const int shift = __builtin_ctzll(w.blocksize / kDotChunk);
    int64_t i = n * chunks_;
    const int64_t end = i + count * chunks_;
#if defined(__AVX512F__)
    // Sixteen at once where no two of them are under different scales of the second level.
    for (; shift == 0 && i + 16 <= end && w.absmax8; i += 16, scales += 16) {
      if (i % kNestedBlock > kNestedBlock - 16) break;
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.absmax8 + i)));
      const __m512 first = _mm512_i32gather_ps(codes, w.nested_code, 4);
      __m512 product = _mm512_mul_ps(first, _mm512_set1_ps(w.nested_absmax[i / kNestedBlock]));
      __asm__("" : "+v"(product));  // rounded by itself, as nf4_scale's
      _mm512_storeu_ps(scales, _mm512_add_ps(product, _mm512_set1_ps(*w.nested_offset)));
    }
#endif
    for (; i < end; ++i, ++scales) *scales = nf4_scale(w, i >> shift);
    return scales_ + id * F::rows * chunks_;
  }
};

template <class K>
static void by_stripes(const Nf4Linear& f) {
  Arena size{nullptr};
  ByStripes<K>(size, f);
  Workspace space(size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const ByStripes<K> forward(arena, f);
#pragma omp parallel num_threads(f.threads)
  forward.run();
}

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
