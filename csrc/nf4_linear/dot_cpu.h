// Rows of x times rows of W, both along K: how a chunk of a row of W comes into registers, and the tile of sums it joins.
// Compiled once per instruction set.
//
// A chunk of 64 elements of a row of W is 32 bytes under one scale. Widened to lanes, the bytes are the indices of its odd
// elements, and shifted down by four of its even ones: a permute looks at no bit above its table. So nothing is unpacked; it is
// the rows of x that are kept in that order, evens and odds apart. The table is level * scale, made once per chunk, in bf16
// rounded as the whole W would be.
#pragma once

#include "../common/low_rank_cpu.h"
#include "scales_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

#if defined(__AVX512F__)
// Four sums of sixteen lanes each.
static inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline float sum_lanes(__m512 v) { return _mm512_reduce_add_ps(v); }
#else
static inline float sum_lanes(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
#endif

// Each decodes a unit of two vectors, of its even and of its odd elements. Tiles are up to `height` rows of x by `rows` rows of
// W, or up to `tall` by `tall_rows`, where W is decoded on the way, and up to `strip_height` by `strip_rows` where it lies
// decoded (tiles_cpu.h): as many sums as there are registers. `run` chunks are one chain of those sums, two runs where W is
// decoded on the way, and what is in the first cache meanwhile.
#if defined(__AVX512BF16__)
// bf16: 32 lanes, two to a sum.
struct DotBf16 {
  using X = bf16;
  using Vector = __m512i;
  static constexpr int lanes = 32, height = 6, rows = 4, tall = 7, tall_rows = 3, strip_height = 6, strip_rows = 4, run = 32;
  __m512 levels;
  explicit DotBf16(const float* level) : levels(_mm512_loadu_ps(level)) {}
  void decode(const uint8_t* packed, float scale, Vector* v) const {
    const __m512 values = _mm512_mul_ps(levels, _mm512_set1_ps(scale));
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    v[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
    v[1] = _mm512_permutexvar_epi16(words, table);
  }
  static Vector load(const X* p) { return _mm512_loadu_si512(p); }
  static void store(X* p, Vector v) { _mm512_storeu_si512(p, v); }
  // The even and the odd elements of two vectors in memory.
  static void split(const X* p, Vector* v) {
    uint16_t order[lanes];
    PK_UNROLL
    for (int i = 0; i < lanes; ++i) order[i] = static_cast<uint16_t>(2 * i);
    const __m512i evens = _mm512_loadu_si512(order), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    v[0] = _mm512_permutex2var_epi16(load(p), evens, load(p + lanes));
    v[1] = _mm512_permutex2var_epi16(load(p), odds, load(p + lanes));
  }
  static __m512 madd(__m512 acc, Vector w, Vector x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
  static __m512 zero() { return _mm512_setzero_ps(); }
};
#endif

#if defined(__AVX512F__)
struct DotFloat {
  using X = float;
  using Vector = __m512;
  static constexpr int lanes = 16, height = 6, rows = 4, tall = 7, tall_rows = 3, strip_height = 6, strip_rows = 4, run = 16;
  __m512 levels;
  explicit DotFloat(const float* level) : levels(_mm512_loadu_ps(level)) {}
  void decode(const uint8_t* packed, float scale, Vector* v) const {
    const __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(scale));
    const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    v[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
    v[1] = _mm512_permutexvar_ps(words, table);
  }
  static Vector load(const X* p) { return _mm512_loadu_ps(p); }
  static void store(X* p, Vector v) { _mm512_storeu_ps(p, v); }
  static void split(const X* p, Vector* v) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    v[0] = _mm512_permutex2var_ps(load(p), evens, load(p + lanes));
    v[1] = _mm512_permutex2var_ps(load(p), _mm512_add_epi32(evens, _mm512_set1_epi32(1)), load(p + lanes));
  }
  static __m512 madd(__m512 acc, Vector w, Vector x) { return _mm512_fmadd_ps(w, x, acc); }
  static __m512 zero() { return _mm512_setzero_ps(); }
};
#else
// A permute has eight lanes: codes below 8 and from 8 on are looked up apart, and bit 3 chooses.
struct DotFloat {
  using X = float;
  using Vector = __m256;
  static constexpr int lanes = 8, height = 4, rows = 1, tall = 4, tall_rows = 1, strip_height = 6, strip_rows = 2, run = 16;
  __m256 low, high;
  explicit DotFloat(const float* level) : low(_mm256_loadu_ps(level)), high(_mm256_loadu_ps(level + 8)) {}
  static __m256 look_up(__m256 below, __m256 above, __m256i codes) {
    const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, codes), _mm256_permutevar8x32_ps(above, codes), choice);
  }
  void decode(const uint8_t* packed, float scale, Vector* v) const {
    const __m256 by = _mm256_set1_ps(scale), below = _mm256_mul_ps(low, by), above = _mm256_mul_ps(high, by);
    const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    v[0] = look_up(below, above, _mm256_srli_epi32(words, 4));
    v[1] = look_up(below, above, words);
  }
  static Vector load(const X* p) { return _mm256_loadu_ps(p); }
  static void store(X* p, Vector v) { _mm256_storeu_ps(p, v); }
  static void split(const X* p, Vector* v) {
    const __m256 a = load(p), b = load(p + lanes);
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xDD));
    v[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xD8));
    v[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xD8));
  }
  static __m256 madd(__m256 acc, Vector w, Vector x) { return _mm256_fmadd_ps(w, x, acc); }
  static __m256 zero() { return _mm256_setzero_ps(); }
};
#endif

// What multiplies rows stored as K::Store.
template <class K>
struct DotOf {
  using type = DotFloat;
};
#if defined(__AVX512BF16__)
template <>
struct DotOf<Kind<Dot2, bf16>> {
  using type = DotBf16;
};
#endif

// Rows of W as they are stored, decoded on the way. One row alone is one stream of bytes, fetched ahead by hand: without
// it, reads reach 85 % of the bandwidth. Of several rows, the same place of the next ones is fetched.
template <class F>
struct PackedRows {
  static constexpr int64_t ahead = 8192, scales_ahead = 1024;  // bytes
  F f;
  const uint8_t* packed;
  const float* scales;
  int64_t row_bytes, row_scales;
  // Unit u of row r.
  template <int R>
  void get(int r, int64_t u, typename F::Vector* v) const {
    constexpr int64_t per_chunk = kDotChunk / (2 * F::lanes);
    const uint8_t* at = packed + r * row_bytes + u * F::lanes;
    if (u % (2 * per_chunk) == 0) __builtin_prefetch(at + (R == 1 ? ahead : R * row_bytes));
    if (R == 1 && u % (16 * per_chunk) == 0)
      __builtin_prefetch(reinterpret_cast<const char*>(scales + u / per_chunk) + scales_ahead);
    f.decode(at, scales[r * row_scales + u / per_chunk], v);
  }
};

// sums[m * sums_ld + n] += x[m] . W[n] over `chunks` chunks, for H rows of x (x_ld apart) and R of W.
template <class F, int H, int R, class Source>
__attribute__((noinline)) static void dot_tile(const Source& w, int64_t chunks, const typename F::X* x, int64_t x_ld,
                                               float* sums, int64_t sums_ld) {
  // With few tiles one chain each would wait for itself: several, over vectors and chunks.
  constexpr int chains = H * R >= 8 ? 1 : H * R >= 4 ? 2 : H * R >= 2 ? 4 : 8;
  constexpr int unroll = chains > 2 ? chains / 2 : 1;
  decltype(F::zero()) acc[H][R][chains];
  PK_UNROLL
  for (int i = 0; i < H * R * chains; ++i) (&acc[0][0][0])[i] = F::zero();
  const auto step = [&](int64_t u, int chain) {
    typename F::Vector v[R][2];
    PK_UNROLL
    for (int r = 0; r < R; ++r) w.template get<R>(r, u, v[r]);
    PK_UNROLL
    for (int i = 0; i < 2; ++i) {
      PK_UNROLL
      for (int h = 0; h < H; ++h) {
        const typename F::Vector at = F::load(x + h * x_ld + (2 * u + i) * F::lanes);
        PK_UNROLL
        for (int r = 0; r < R; ++r) {
          auto& one = acc[h][r][(chain + i) % chains];
          one = F::madd(one, v[r][i], at);
        }
      }
    }
  };
  const int64_t units = chunks * kDotChunk / (2 * F::lanes);
  int64_t u = 0;
  for (; u + unroll <= units; u += unroll) {
    PK_UNROLL
    for (int i = 0; i < unroll; ++i) step(u + i, 2 * i);
  }
  for (; u < units; ++u) step(u, 0);
  PK_UNROLL
  for (int h = 0; h < H; ++h) {
    PK_UNROLL
    for (int r = 0; r < R; ++r) {
      PK_UNROLL
      for (int i = 1; i < chains; ++i) acc[h][r][0] = acc[h][r][0] + acc[h][r][i];
    }
    float* to = sums + h * sums_ld;
#if defined(__AVX512F__)
    if constexpr (R >= 3) {
      constexpr __mmask8 those = (1 << R) - 1;
      const __m128 found = sum_lanes(acc[h][0][0], acc[h][1][0], acc[h][2][0], acc[h][R - 1][0]);
      _mm_mask_storeu_ps(to, those, _mm_add_ps(_mm_maskz_loadu_ps(those, to), found));
      continue;
    }
#endif
    PK_UNROLL
    for (int r = 0; r < R; ++r) to[r] += sum_lanes(acc[h][r][0]);
  }
}

// The same for a height known at run time, at most H.
template <class F, int H, int R, class Source>
static void dot_rows(const Source& w, int64_t chunks, const typename F::X* x, int64_t x_ld, int64_t height, float* sums,
                     int64_t sums_ld) {
  if (height == H) return dot_tile<F, H, R>(w, chunks, x, x_ld, sums, sums_ld);
  if constexpr (H > 1) dot_rows<F, H - 1, R>(w, chunks, x, x_ld, height, sums, sums_ld);
}

// One row of K elements of x, each vector's worth of even elements before the odd ones.
template <class F>
static void order_for_codes(typename F::X* to, const typename F::X* row, int64_t K) {
  for (int64_t k = 0; k < K; k += 2 * F::lanes)
    PK_UNROLL
    for (int i = 0; i < F::lanes; ++i) to[k + i] = row[k + 2 * i], to[k + F::lanes + i] = row[k + 2 * i + 1];
}

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
