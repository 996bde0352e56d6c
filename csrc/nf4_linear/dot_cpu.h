// Rows of x times rows of W, both along K: how a chunk of a row of W comes into registers, and the tile of sums it joins.
// Compiled once per instruction set.
//
// A chunk of 64 elements of a row of W is 32 bytes under one scale. Widened to lanes, the bytes are the indices of its odd
// elements, and shifted down by four of its even ones: a permute looks at no bit above its table. So nothing is unpacked; it is
// the rows of x that are kept in that order, evens and odds apart. The table is level * scale, made once per chunk, in bf16
// rounded as the whole W would be (but for subnormal numbers, which the products take for zeros anyway).
#pragma once

#include "../common/blocks_cpu.h"
#include "../common/micro_kernel_cpu.h"
#include "plan_cpu.h"
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
#else
static inline float sum_lanes(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
#endif

// sums[h * sums_ld + r * sums_step] += the lanes of sum h * R + r, for H rows of x and R of W.
template <int H, int R, class Sum>
PK_INLINE static void add_sums(const Sum* acc, float* sums, int64_t sums_ld, int64_t sums_step = 1) {
#if defined(__AVX512F__)
  constexpr int last = H * R - 1;
  alignas(16) float found[H * R + 3];
  PK_UNROLL
  for (int i = 0; i < H * R; i += 4) {
    const __m128 four = sum_lanes(acc[i], acc[i < last ? i + 1 : last], acc[i + 1 < last ? i + 2 : last],
                                  acc[i + 2 < last ? i + 3 : last]);
    float* to = sums + i / R * sums_ld;
    if (R == 4 && sums_step == 1)
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    else
      _mm_storeu_ps(found + i, four);
  }
  if (R == 4 && sums_step == 1) return;
  PK_UNROLL
  for (int i = 0; i < H * R; ++i) sums[i / R * sums_ld + i % R * sums_step] += found[i];
#else
  PK_UNROLL
  for (int i = 0; i < H * R; ++i) sums[i / R * sums_ld + i % R * sums_step] += sum_lanes(acc[i]);
#endif
}

// Each decodes a unit of two vectors, of its even and of its odd elements, in `steps` steps; `fresh` where its table is not that
// of the unit before. Where W is decoded on the way, tiles are up to `height` rows of x by rows(height) of W, and up to
// `strip_height` by `strip_rows` where it lies decoded (tiles_cpu.h): as many sums as there are registers. `run` chunks are one
// chain of those sums, two runs where W is decoded on the way, and what is in the first cache meanwhile.
#if defined(__AVX512BF16__)
// bf16: 32 lanes, two to a sum.
struct DotBf16 {
  using X = bf16;
  using Vector = __m512i;
  static constexpr int lanes = 32, height = kTallTile, strip_height = 6, strip_rows = 4, run = 32, steps = 6;
  static constexpr int rows(int H) { return H <= 5 ? 4 : H <= 8 ? 3 : 2; }
  struct Unit {
    Vector words, table, v[2];
    __m512 values;
  };
  __m512 levels;
  explicit DotBf16(const float* level) : levels(_mm512_loadu_ps(level)) {}
  PK_INLINE void step(int i, const uint8_t* packed, float scale, bool fresh, Unit& u) const {
    switch (i) {
      case 0: if (fresh) u.values = _mm512_mul_ps(levels, _mm512_set1_ps(scale)); break;
      case 1: u.words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed))); break;
      case 2: if (fresh) u.table = (__m512i)_mm512_cvtne2ps_pbh(u.values, u.values); break;
      case 3: u.v[0] = _mm512_srli_epi16(u.words, 4); break;
      case 4: u.v[0] = _mm512_permutexvar_epi16(u.v[0], u.table); break;
      case 5: u.v[1] = _mm512_permutexvar_epi16(u.words, u.table); break;
    }
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
  static constexpr int lanes = 16, height = kTallTile, strip_height = 6, strip_rows = 4, run = 16, steps = 5;
  static constexpr int rows(int H) { return H <= 5 ? 4 : 2; }
  struct Unit {
    __m512i words, evens;
    Vector table, v[2];
  };
  __m512 levels;
  explicit DotFloat(const float* level) : levels(_mm512_loadu_ps(level)) {}
  PK_INLINE void step(int i, const uint8_t* packed, float scale, bool fresh, Unit& u) const {
    switch (i) {
      case 0: if (fresh) u.table = _mm512_mul_ps(levels, _mm512_set1_ps(scale)); break;
      case 1: u.words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))); break;
      case 2: u.evens = _mm512_srli_epi32(u.words, 4); break;
      case 3: u.v[0] = _mm512_permutexvar_ps(u.evens, u.table); break;
      case 4: u.v[1] = _mm512_permutexvar_ps(u.words, u.table); break;
    }
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
  static constexpr int lanes = 8, height = 4, strip_height = 6, strip_rows = 2, run = 16, steps = 5;
  static constexpr int rows(int H) { return H <= 2 ? 2 : 1; }
  struct Unit {
    __m256i words;
    Vector below, above, v[2];
  };
  __m256 low, high;
  explicit DotFloat(const float* level) : low(_mm256_loadu_ps(level)), high(_mm256_loadu_ps(level + 8)) {}
  static __m256 look_up(__m256 below, __m256 above, __m256i codes) {
    const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, codes), _mm256_permutevar8x32_ps(above, codes), choice);
  }
  PK_INLINE void step(int i, const uint8_t* packed, float scale, bool fresh, Unit& u) const {
    switch (i) {
      case 0: if (fresh) u.below = _mm256_mul_ps(low, _mm256_set1_ps(scale)); break;
      case 1: if (fresh) u.above = _mm256_mul_ps(high, _mm256_set1_ps(scale)); break;
      case 2: u.words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed))); break;
      case 3: u.v[0] = look_up(u.below, u.above, _mm256_srli_epi32(u.words, 4)); break;
      case 4: u.v[1] = look_up(u.below, u.above, u.words); break;
    }
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
template <class Store>
struct DotOf<Kind<Dot2, Store>> {
  using type = DotBf16;
};
#endif

// A unit under this scale, at once.
template <class F>
static inline void decode_unit(const F& f, const uint8_t* packed, float scale, typename F::Vector* v) {
  typename F::Unit unit;
  PK_UNROLL
  for (int i = 0; i < F::steps; ++i) f.step(i, packed, scale, true, unit);
  v[0] = unit.v[0], v[1] = unit.v[1];
}

// sums[h * sums_ld + r * sums_step] += x[h] . W[r] over `chunks` chunks, for H rows of x, packed as in tiles_cpu.h, and R of W as
// they are stored: row r from chunk rows[r] of `stored` on (scales_cpu.h). With registers enough, the next unit is decoded while
// one is multiplied, step by step in between: permutes and products are made by different parts of a core, but not while one
// waits in line behind the other.
template <class F, int H, int R, class Stored>
__attribute__((noinline)) static void dot_tile(const F& f, const Stored& stored, const int64_t (&rows)[R], int64_t ahead,
                                               int64_t chunks, const typename F::X* x, float* sums, int64_t sums_ld,
                                               int64_t sums_step = 1) {
  const Stored w = stored;
  int64_t first[R];  // numbers, not pointers to bytes and to scales: twice as many are not all kept in registers
  PK_UNROLL
  for (int r = 0; r < R; ++r) first[r] = rows[r];
  constexpr bool early = PK_VECTOR_BYTES == 64;
  static_assert(kDotChunk % (2 * F::lanes) == 0, "a chunk is a whole number of units");
  constexpr int per_chunk = kDotChunk / (2 * F::lanes), slots = 2 * H, steps = R * F::steps, Q = H * R;
  // A sum waits for itself as long as several others take. In as many chains alone as beside others: the same bits.
  constexpr int chains = early && H * F::rows(H) >= 8 ? 1 : 2;
  decltype(F::zero()) acc[chains][Q];
  PK_UNROLL
  for (int i = 0; i < chains * Q; ++i) (&acc[0][0])[i] = F::zero();
  typename F::Unit unit[R];
  typename F::Vector v[R][2];
  const auto decode = [&](int64_t chunk, int u, int step) {
    const int r = step / F::steps;
    const int64_t i = first[r] + chunk;
    f.step(step % F::steps, w.packed + i * (kDotChunk / 2) + u * F::lanes, w.scale(r, i), u == 0, unit[r]);
  };
  PK_UNROLL
  for (int step = 0; step < (early ? steps : 0); ++step) decode(0, 0, step);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t next = c + 1 < chunks ? c + 1 : c;  // what follows the last one is not there to be read
    if (c % 2 == 0) {
      PK_UNROLL
      for (int r = 0; r < R; ++r) __builtin_prefetch(w.packed + (first[r] + c) * (kDotChunk / 2) + ahead);
    }
    PK_UNROLL
    for (int u = 0; u < per_chunk; ++u) {
      PK_UNROLL
      for (int step = 0; step < (early ? 0 : steps); ++step) decode(c, u, step);
      PK_UNROLL
      for (int r = 0; r < R; ++r) v[r][0] = unit[r].v[0], v[r][1] = unit[r].v[1];
      PK_UNROLL
      for (int slot = 0; slot < slots; ++slot) {
        const int h = slot % H, i = slot / H;
        const typename F::Vector one = F::load(x + ((c * per_chunk + u) * slots + slot) * F::lanes);
        PK_UNROLL
        for (int r = 0; r < R; ++r) {
          auto& sum = acc[i % chains][h * R + r];
          sum = F::madd(sum, v[r][i], one);
        }
        PK_UNROLL
        for (int step = 0; step < (early ? steps : 0); ++step)
          if (step * slots / steps == slot) decode(u + 1 < per_chunk ? c : next, (u + 1) % per_chunk, step);
      }
    }
  }
  PK_UNROLL
  for (int i = 0; i < Q && chains == 2; ++i) acc[0][i] = acc[0][i] + acc[chains - 1][i];
  add_sums<H, R>(acc[0], sums, sums_ld, sums_step);
}

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
