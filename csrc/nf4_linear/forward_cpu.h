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
constexpr int64_t kPackedStripe = 60;  // the same where tiles have 3 or 4 rows of W
constexpr int64_t kScalesAhead = 2;    // rows of W
constexpr int64_t kForwardRows = 512;  // rows of x at a time: the sums of a stripe and a copy of x stay small

#if defined(__AVX512F__)
// table[codes] of 256 floats: a gather takes four times as long, and loads one by one into memory are read back late.
static inline __m512 look_up(const __m512* table, __m512i codes) {
  __m512 of[8];  // by the lower five bits, of each 32
  PK_UNROLL
  for (int i = 0; i < 8; ++i) of[i] = _mm512_permutex2var_ps(table[2 * i], codes, table[2 * i + 1]);
  PK_UNROLL
  for (int bit = 5; bit < 8; ++bit) {
    const __mmask16 upper = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(1 << bit));
    PK_UNROLL
    for (int i = 0; i < 128 >> bit; ++i) of[i] = _mm512_mask_blend_ps(upper, of[2 * i], of[2 * i + 1]);
  }
  return of[0];
}
#endif

// nf4_scale of `count` blocks from i on, all with double quantisation and under one scale of the second level.
static inline void nested_scales(const Nf4Weight& w, int64_t i, int64_t count, float* scales) {
  int64_t j = 0;
#if defined(__AVX512F__)
  __m512 table[16];
  PK_UNROLL
  for (int k = 0; k < 16; ++k) table[k] = _mm512_loadu_ps(w.nested_code + 16 * k);
  for (; j + 16 <= count; j += 16) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.absmax8 + i + j)));
    __m512 product = _mm512_mul_ps(look_up(table, codes), _mm512_set1_ps(w.nested_absmax[i / kNestedBlock]));
    __asm__("" : "+v"(product));  // rounded by itself: the compiler may not join it with the sum
    _mm512_storeu_ps(scales + j, _mm512_add_ps(product, _mm512_set1_ps(*w.nested_offset)));
  }
#endif
  for (; j < count; ++j) scales[j] = nf4_scale(w, i + j);
}

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
  static_assert(kDotChunk % (2 * F::lanes) == 0, "a chunk is a whole number of units");

  const Nf4Linear& f_;
  bool packed_, in_place_, chunks_of_blocks_;
  int64_t most_, stripe_, stripes_, chunks_, x_ld_;
  X *x_, *row_, *strip_;
  float *sums_, *scales_;
  int64_t* next_;

 public:
  ByStripes(Arena& arena, const Nf4Linear& f)
      : f_(f),
        packed_(in_chunks(f) && f.M <= (K::pair == 2 ? kPackedRowsDot : kPackedRowsFma)),
        in_place_(!packed_ && sizeof(typename K::Store) == sizeof(X) && f.K % kDotChunk == 0),
        chunks_of_blocks_(in_chunks(f) && sizeof(X) == 2),
        most_(min64(f.M, kForwardRows)),
        stripe_(min64(kStripe, round_up(ceil_div(f.N, f.threads), 4))),
        stripes_(ceil_div(f.N, stripe_)),
        chunks_(ceil_div(f.K, kDotChunk)),
        x_ld_(in_place_ ? f.left.row : chunks_ * kDotChunk + 64),
        x_(in_place_ ? nullptr : arena.take<X>(most_ * x_ld_)),
        row_(arena.take<X>(packed_ ? f.threads * f.K : 0)),
        strip_(arena.take<X>(packed_ ? 0 : f.threads * kStripe * strip_ld_)),
        sums_(arena.take<float>(f.threads * most_ * kStripe)),
        scales_(arena.take<float>(f.threads * kPackedStripe * chunks_)),
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
        for (int64_t n = id * size; n < end; n += kPackedStripe) packed_stripe(n, min64(kPackedStripe, end - n), id);
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
    const F f(nf4_levels(f_.weight));
    const X* x = in_place_ ? static_cast<const X*>(f_.left.data) + m0 * x_ld_ : x_;
    for (int64_t k = 0; k < f_.K; k += run_) {
      const int64_t here = min64(run_, f_.K - k), chunks = ceil_div(here, kDotChunk);
      for (int64_t n = 0; n < count; ++n) {
        X* line = strip + n * strip_ld_;
        if (n0 + n + 1 < f_.N) fetch(f_.weight.packed + ((n0 + n + 1) * f_.K + k) / 2, here / 2);
        if (chunks_of_blocks_)
          decode_line(f, (n0 + n) * f_.K + k, chunks, line, id);
        else
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

  // nf4_decode for whole chunks, without what it does for subnormal values, which the products here take for zero anyway.
  void decode_line(const F& f, int64_t first, int64_t chunks, X* line, int id) const {
    if constexpr (sizeof(X) == 2) {
      float* const made = scales_ + id * kPackedStripe * chunks_;
      const float* scales = has_scales() ? f_.weight.absmax + first / kDotChunk : made;
      if (!has_scales()) make_scales(first / kDotChunk, chunks, made);
      for (int64_t c = 0; c < chunks; ++c)
        f.decode_plain(f_.weight.packed + (first + c * kDotChunk) / 2, scales[c], line + c * kDotChunk);
    }
  }

  static void fetch(const uint8_t* bytes, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(bytes + i);
  }

  void packed_stripe(int64_t n0, int64_t count, int id) const {
    const F f(nf4_levels(f_.weight));
    float* const made = scales_ + id * kPackedStripe * chunks_;
    const float* scales = has_scales() ? f_.weight.absmax + n0 * chunks_ : made;
    int64_t ready = has_scales() ? count : 0;  // rows whose scales are there
    // A row's scales are made before those of the rows ahead of it are used: made just in time they would be waited for, and
    // made for all rows at once, no bytes would be fetched meanwhile.
    const auto prepare = [&](int64_t rows) {
      const int64_t until = min64(count, rows + kScalesAhead);
      if (ready < until) make_scales((n0 + ready) * chunks_, (until - ready) * chunks_, made + ready * chunks_);
      ready = ready < until ? until : ready;
    };
    float* sums = sums_ + id * most_ * kStripe;
    memset(sums, 0, f_.M * kStripe * sizeof(float));
    const int64_t groups = f_.M <= F::tall ? 1 : ceil_div(f_.M, F::height), height = ceil_div(f_.M, groups);
    int64_t n = 0;
    if (height > F::height)
      for (; n + F::tall_rows <= count; n += F::tall_rows)
        prepare(n + F::tall_rows), packed_rows<F::tall, F::tall_rows>(f, n0 + n, scales + n * chunks_, height, sums + n);
    else if (f_.M > 1)
      for (; n + F::rows <= count; n += F::rows)
        prepare(n + F::rows), packed_rows<F::height, F::rows>(f, n0 + n, scales + n * chunks_, height, sums + n);
    for (; n < count; ++n) prepare(n + 1), packed_rows<F::tall, 1>(f, n0 + n, scales + n * chunks_, height, sums + n);
    finish(sums, 0, f_.M, n0, count);
  }

  // R rows of W from n on with all rows of x, `height` and at most H of them at a time.
  template <int H, int R>
  void packed_rows(const F& f, int64_t n, const float* scales, int64_t height, float* sums) const {
    const uint8_t* packed = f_.weight.packed + n * (f_.K / 2);
    constexpr int64_t run = 2 * F::run;
    for (int64_t c = 0; c < chunks_; c += run) {
      const PackedRows<F> w{f, packed + c * (kDotChunk / 2), scales + c, f_.K / 2, chunks_};
      for (int64_t m = 0; m < f_.M; m += height)
        dot_rows<F, H, R>(w, min64(run, chunks_ - c), x_ + m * x_ld_ + c * kDotChunk, x_ld_, min64(height, f_.M - m),
                          sums + m * kStripe, kStripe);
    }
  }

  // Whether the scale of each chunk lies in its place.
  bool has_scales() const { return f_.weight.absmax && f_.weight.blocksize == kDotChunk; }

  // The scales of `count` chunks of the flat tensor from chunk i on.
  void make_scales(int64_t i, int64_t count, float* scales) const {
    const Nf4Weight w = f_.weight;
    const int shift = __builtin_ctzll(w.blocksize / kDotChunk);
    const int64_t end = i + count;
    while (shift == 0 && w.absmax8 && i < end) {
      const int64_t stop = min64(end, round_up(i + 1, kNestedBlock));
      nested_scales(w, i, stop - i, scales);
      scales += stop - i, i = stop;
    }
    for (; i < end; ++i, ++scales) *scales = nf4_scale(w, i >> shift);
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
