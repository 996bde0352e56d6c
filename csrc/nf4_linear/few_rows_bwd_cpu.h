// dx = dy @ W + addend for a few rows of dy: W is decoded in registers, and nothing of it is written. Compiled once per
// instruction set.
//
// The columns of dx are shared among the threads, a block of them at a time, so that their sums stay in cache. A block goes
// down the rows of W in groups: of a chunk of 64 columns the tables of the group's rows (dot_cpu.h) are made first, then each
// unit of columns is one chain of sums in registers down the group, for several rows of dy, and joins its sums in memory. Those
// join a total from time to time: short chains round less than one long one. No sum is shared among threads, and none depends
// on their number.
#pragma once

#include "../common/tasks_cpu.h"
#include "dot_cpu.h"
#include "finish_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kDownRows = 16;     // rows of W in a group
constexpr int64_t kDownGroups = 64;   // groups whose sums join the total together
constexpr int64_t kDownChunks = 32;   // of a block of columns
constexpr int64_t kDownAhead = 16;    // chunks fetched ahead
constexpr int64_t kLineChunks = 2;    // whose bytes fill a cache line

// Each decodes a unit of columns of `step` rows of W, its even elements apart from its odd ones, and multiplies it with as many
// elements of a row of dy. `height` rows of dy have their sums in registers together.
#if defined(__AVX512BF16__)
// Two rows of W, their elements interleaved: the table's lower half is the first row's, its upper half the second one's.
struct DownBf16 {
  using X = bf16;
  using Factor = uint32_t;
  using Table = __m512i;
  using Vector = __m512i;
  using Sum = __m512;
  static constexpr int step = 2, unit = 32, height = 8;
  __m512 levels;
  explicit DownBf16(const float* level) : levels(_mm512_loadu_ps(level)) {}
  Table table(const float* scale) const {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale[1])),
                                        _mm512_mul_ps(levels, _mm512_set1_ps(scale[0])));
  }
  static void decode(const uint8_t* first, const uint8_t* second, Table table, Vector* v) {
    const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)));
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(second)));
    const __m512i words = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    const __m512i code = _mm512_set1_epi32(0x000F000F), upper = _mm512_set1_epi32(0x00100000);
    v[0] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4), code, upper, 0xEA), table);
    v[1] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(words, code, upper, 0xEA), table);  // (words & code) | upper
  }
  static Sum madd(Sum acc, Vector v, Factor by) {
    return _mm512_dpbf16_ps(acc, (__m512bh)v, (__m512bh)_mm512_set1_epi32(static_cast<int>(by)));
  }
};
#endif

struct DownFloat {
  using X = float;
  using Factor = float;
  static constexpr int step = 1, unit = 2 * DotFloat::lanes, height = DotFloat::lanes == 16 ? 8 : 4;
  using Sum = typename Vec<float>::type;
  using Vector = typename DotFloat::Vector;
#if defined(__AVX512F__)
  using Table = __m512;
  __m512 levels;
  explicit DownFloat(const float* level) : levels(_mm512_loadu_ps(level)) {}
  Table table(const float* scale) const { return _mm512_mul_ps(levels, _mm512_set1_ps(*scale)); }
  static void decode(const uint8_t* packed, const uint8_t*, Table table, Vector* v) {
    const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    v[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
    v[1] = _mm512_permutexvar_ps(words, table);
  }
#else
  struct Table {
    __m256 below, above;
  };
  __m256 low, high;
  explicit DownFloat(const float* level) : low(_mm256_loadu_ps(level)), high(_mm256_loadu_ps(level + 8)) {}
  Table table(const float* scale) const {
    const __m256 by = _mm256_set1_ps(*scale);
    return {_mm256_mul_ps(low, by), _mm256_mul_ps(high, by)};
  }
  static void decode(const uint8_t* packed, const uint8_t*, Table table, Vector* v) {
    const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    v[0] = DotFloat::look_up(table.below, table.above, _mm256_srli_epi32(words, 4));
    v[1] = DotFloat::look_up(table.below, table.above, words);
  }
#endif
  static Sum madd(Sum acc, Vector v, Factor by) { return acc + (Sum)v * by; }
};

template <class K>
struct DownOf {
  using type = DownFloat;
};
#if defined(__AVX512BF16__)
template <class Store>
struct DownOf<Kind<Dot2, Store>> {
  using type = DownBf16;
};
#endif

template <class K>
class FewRowsBackward {
  using F = typename DownOf<K>::type;
  using X = typename F::X;
  using Factor = typename F::Factor;
  static constexpr int64_t steps_ = kDownRows / F::step, width_ = kDownChunks * kDotChunk, lanes_ = F::unit / 2;
  static constexpr int64_t sums_ld_ = width_ + 16;  // off the power of two that would share cache sets
  static_assert(sizeof(Factor) == F::step * sizeof(X) && kDownRows % F::step == 0 && kDotChunk % F::unit == 0);

  const Nf4Linear f_;
  int64_t chunks_, blocks_, block_;  // of a row of W; blocks of columns, and chunks in each
  float *sums_, *total_, *scales_;
  Factor* dy_;

  // A group of rows of W, and of its columns a block.
  struct Group {
    int64_t rows;
    const uint8_t* packed;
    const float* scales;  // [rows], scales_ld apart
    int64_t scales_ld;
    bool more;  // whether a group follows, whose bytes are to be fetched
  };

 public:
  FewRowsBackward(Arena& arena, const Nf4Linear& f)
      : f_(f),
        chunks_(f.K / kDotChunk),
        blocks_(round_up(ceil_div(chunks_, kDownChunks), min64(f.threads, ceil_div(chunks_, kLineChunks)))),
        block_(round_up(ceil_div(chunks_, blocks_), kLineChunks)),
        sums_(arena.take<float>(f.threads * f.M * sums_ld_)),
        total_(arena.take<float>(f.threads * f.M * sums_ld_)),
        scales_(arena.take<float>(f.threads * kDownRows * kDownChunks)),
        dy_(arena.take<Factor>(f.threads * dy_apart())) {}

  // Between the threads: no line of the cache is shared by two that write to it, nor a neighbour that is fetched with it.
  int64_t dy_apart() const { return round_up(f_.M * steps_, 32) + 32; }

  // By every thread of a team.
  void run() const {
    for (int64_t b = thread_id(); b < blocks_; b += team_size())
      if (b * block_ < chunks_) down(b * block_, min64(block_, chunks_ - b * block_), thread_id());
  }

 private:
  // The columns of `count` chunks from c0 on.
  void down(int64_t c0, int64_t count, int id) const {
    const F f(nf4_levels(f_.weight));
    float *sums = sums_ + id * f_.M * sums_ld_, *total = total_ + id * f_.M * sums_ld_;
    float* made = scales_ + id * kDownRows * kDownChunks;
    Factor* dy = dy_ + id * dy_apart();
    memset(total, 0, f_.M * sums_ld_ * sizeof(float));
    for (int64_t n = 0, groups = 0; n < f_.N; n += kDownRows, ++groups) {
      if (groups % kDownGroups == 0) join(sums, total, groups > 0);
      const int64_t rows = min64(kDownRows, f_.N - n), first = n * chunks_ + c0;
      Group group{rows, f_.weight.packed + first * (kDotChunk / 2), made, kDownChunks, n + 2 * kDownRows <= f_.N};
      if (has_chunk_scales(f_.weight))
        group.scales = f_.weight.absmax + first, group.scales_ld = chunks_;
      else
        for (int64_t r = 0; r < rows; ++r)
          make_chunk_scales(f_.weight, first + r * chunks_, count, made + r * kDownChunks);
      for (int64_t r = 0; group.more && r < kDownRows; ++r) fetch_scales(first + (kDownRows + r) * chunks_, count);
      for (int64_t m = 0; m < f_.M; ++m) take_factors(dy + m * steps_, m, n, rows);
      for (int64_t m = 0; m < f_.M; m += F::height)
        group_rows<F::height>(f, group, count, dy + m * steps_, min64(F::height, f_.M - m), sums + m * sums_ld_);
    }
    join(sums, total, f_.N > 0);
    for (int64_t m = 0; m < f_.M; ++m)
      for (int64_t c = 0; c < count; ++c) finish(total + m * sums_ld_ + c * kDotChunk, m, (c0 + c) * kDotChunk);
  }

  // Of chunks that are one block each; of larger blocks there are few.
  void fetch_scales(int64_t i, int64_t count) const {
    const char* at = f_.weight.absmax8 ? reinterpret_cast<const char*>(f_.weight.absmax8 + i)
                                       : reinterpret_cast<const char*>(f_.weight.absmax + i);
    if (f_.weight.blocksize > kDotChunk) return;
    for (int64_t j = 0; j < (f_.weight.absmax8 ? count : 4 * count); j += 64) __builtin_prefetch(at + j);
  }

  void join(float* sums, float* total, bool filled) const {
    if (filled)
      for (int64_t i = 0; i < f_.M * sums_ld_; ++i) total[i] += sums[i];
    memset(sums, 0, f_.M * sums_ld_ * sizeof(float));
  }

  // dy[m, n .. n + rows), and zeros for the rows that W does not have.
  void take_factors(Factor* to, int64_t m, int64_t n, int64_t rows) const {
    X* line = reinterpret_cast<X*>(to);
    convert(line, static_cast<const typename K::Store*>(f_.left.data) + m * f_.left.row + n, rows);
    for (int64_t i = rows; i < kDownRows; ++i) line[i] = X{};
  }

  void finish(const float* sums, int64_t m, int64_t k) const {
    float row[kDotChunk];
    for (int64_t u = 0; u < kDotChunk; u += F::unit)
      for (int64_t i = 0; i < lanes_; ++i) row[u + 2 * i] = sums[u + i], row[u + 2 * i + 1] = sums[u + lanes_ + i];
    nf4_finish<K>(f_, row, m, k, kDotChunk, f_.K);
  }

  // For a height known at run time, at most H.
  template <int H>
  void group_rows(const F& f, const Group& group, int64_t count, const Factor* dy, int64_t height, float* sums) const {
    if (height == H) return add_group<H>(f, group, count, dy, sums);
    if constexpr (H > 1) group_rows<H - 1>(f, group, count, dy, height, sums);
  }

  // sums[h] += dy[h] @ the group, for H rows of dy.
  template <int H>
  void add_group(const F& f, const Group& group, int64_t count, const Factor* dy, float* sums) const {
    if (group.rows == kDownRows) return add_rows<H, true>(f, group, count, dy, sums);
    add_rows<H, false>(f, group, count, dy, sums);
  }

  // The bytes of chunk c of all rows, or of the group that follows. Rows are often a power of two apart, so that a column of
  // them shares few sets of the first cache: what was fetched a whole group ahead would not stay there.
  void fetch(const Group& group, int64_t c, int64_t count) const {
    const int64_t row_bytes = f_.K / 2;
    if (c >= count && !group.more) return;
    const uint8_t* at = group.packed + (c < count ? c : c - count) * (kDotChunk / 2) + (c < count ? 0 : kDownRows * row_bytes);
    PK_UNROLL
    for (int64_t r = 0; r < kDownRows; ++r) __builtin_prefetch(at + r * row_bytes);
  }

  // full: kDownRows rows.
  template <int H, bool full>
  void add_rows(const F& f, const Group& group, int64_t count, const Factor* dy, float* sums) const {
    constexpr int vectors = H <= F::height / 2 ? 4 : 2;  // of a chunk, at a time
    constexpr int at_once = vectors / 2 * F::unit;
    const int64_t row_bytes = f_.K / 2, rows = full ? kDownRows : group.rows;
    typename F::Table table[steps_];
    for (int64_t c = 0; c < count; ++c) {
      const uint8_t* packed = group.packed + c * (kDotChunk / 2);
      if (c % kLineChunks == 0) fetch(group, c + kDownAhead, count);
      PK_UNROLL
      for (int64_t s = 0; s < steps_; ++s) {
        float scale[F::step];
        PK_UNROLL
        for (int64_t i = 0; i < F::step; ++i) {
          const int64_t r = s * F::step + i;
          scale[i] = full || r < rows ? group.scales[r * group.scales_ld + c] : 0.0f;
        }
        table[s] = f.table(scale);
      }
      for (int64_t u = 0; u < kDotChunk; u += at_once) {
        const uint8_t* line = packed + u / 2;
        typename F::Sum acc[H][vectors] = {};
        PK_UNROLL
        for (int64_t s = 0; s < steps_; ++s, line += F::step * row_bytes) {
          if (!full && s * F::step >= rows) break;
          PK_UNROLL
          for (int j = 0; j < vectors; j += 2) {
            typename F::Vector v[2];
            const uint8_t* at = line + j / 2 * (F::unit / 2);
            // A row that is missing has a scale of zero and a factor of zero: its neighbour's bytes will do.
            F::decode(at, full || (s + 1) * F::step <= rows ? at + row_bytes : at, table[s], v);
            PK_UNROLL
            for (int h = 0; h < H; ++h) {
              PK_UNROLL
              for (int i = 0; i < 2; ++i) acc[h][j + i] = F::madd(acc[h][j + i], v[i], dy[h * steps_ + s]);
            }
          }
        }
        PK_UNROLL
        for (int h = 0; h < H; ++h) {
          PK_UNROLL
          for (int i = 0; i < vectors; ++i) {
            float* to = sums + h * sums_ld_ + c * kDotChunk + u + i * lanes_;
            store(to, load(to) + (typename Vec<float>::type)acc[h][i]);
          }
        }
      }
    }
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
