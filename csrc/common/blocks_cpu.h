// Blocks that stay in cache: chunks of rows, packed adapters, dropout bits. Compiled once per instruction set.
#pragma once

#include "philox.h"
#include "simd_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

template <int bytes>
struct BitsOf {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// What a kernel is compiled for: the arithmetic and the type in memory.
template <class Math_, class Store_>
struct Kind {
  using Math = Math_;
  using Store = Store_;
  using Acc = typename Math::Acc;
  using Step = typename Math::Step;
  using Elem = typename Math::Elem;
  static constexpr int pair = Math::pair;
  static constexpr int W = Vec<Acc>::lanes;
  static constexpr int panel_vectors = PK_VECTOR_BYTES == 64 ? 4 : 2;
  static constexpr int panel = panel_vectors * W;      // columns per panel of a packed wide operand
  static constexpr int chunk_steps = 256;              // columns of x or dy held at a time, in steps
  static constexpr int chunk_cols = chunk_steps * pair;
  static constexpr int chunk_ld = chunk_steps + 16;    // in steps; off the power of two that would share cache sets
  static constexpr int pairs_ld = chunk_cols + 16;     // in steps, of the chunk with rows interleaved
  static constexpr int chain = pair == 2 ? 256 : 64;   // terms summed before they join a longer sum; bf16 hides 128 steps
};

constexpr int64_t kBlockRows = 288;  // rows in flight; a multiple of every tile height
constexpr int64_t kChainRows = 48;  // rows summed in registers for an adapter gradient
static_assert(kBlockRows % kChainRows == 0, "blocks are cut in chains");

// Bump allocator used twice: with a null base to measure, then for real.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64) + 64;
    return p;
  }
};

// Zero the elements of row[0, n) whose bit is clear; row[0] is column `col` of the mask row `bits`.
template <class T>
static inline void apply_mask(T* row, const uint8_t* bits, int64_t col, int64_t n) {
  int64_t j = 0;
  if (col % 8 == 0) {
    [[maybe_unused]] const uint8_t* byte = bits + col / 8;
#if defined(__AVX512BW__)
    if constexpr (sizeof(T) == 4) {
      for (; j + 16 <= n; j += 16, byte += 2) {
        uint16_t keep;
        memcpy(&keep, byte, 2);
        _mm512_storeu_ps(row + j, _mm512_maskz_loadu_ps(keep, row + j));
      }
    } else if constexpr (sizeof(T) == 2) {
      for (; j + 32 <= n; j += 32, byte += 4) {
        uint32_t keep;
        memcpy(&keep, byte, 4);
        _mm512_storeu_si512(row + j, _mm512_maskz_loadu_epi16(keep, row + j));
      }
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      for (; j + 8 <= n; j += 8, ++byte) {
        const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(*byte), select);
        const __m256i keep = _mm256_cmpeq_epi32(hit, select);
        float* p = reinterpret_cast<float*>(row + j);
        _mm256_storeu_ps(p, _mm256_and_ps(_mm256_castsi256_ps(keep), _mm256_loadu_ps(p)));
      }
    }
#endif
  }
  for (; j < n; ++j)
    if (!((bits[(col + j) >> 3] >> ((col + j) & 7)) & 1)) row[j] = T{};
}

// mask[i] = the byte of counter first + i.
static inline void fill_mask(uint8_t* mask, int64_t count, uint64_t seed, uint64_t first, uint32_t threshold) {
  int64_t i = 0;
#if defined(__AVX512F__)
  // One counter per 64-bit lane. The upper halves carry leftovers of products, which a 32 x 32 multiplication does not see.
  const __m512i m0 = _mm512_set1_epi64(philox::kM0), m1 = _mm512_set1_epi64(philox::kM1);
  const __m512i limit = _mm512_set1_epi64(threshold), low16 = _mm512_set1_epi64(0xFFFF);
  const __m512i iota = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (; i + 8 <= count; i += 8) {
    const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + i)), iota);
    __m512i c[4] = {counter, _mm512_srli_epi64(counter, 32), _mm512_setzero_si512(), _mm512_setzero_si512()};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    PK_UNROLL
    for (int round = 0; round < philox::kRounds; ++round, k0 += philox::kW0, k1 += philox::kW1) {
      const __m512i p0 = _mm512_mul_epu32(c[0], m0), p1 = _mm512_mul_epu32(c[2], m1);
      c[0] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c[1]), _mm512_set1_epi64(k0));
      c[2] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c[3]), _mm512_set1_epi64(k1));
      c[1] = p1;
      c[3] = p0;
    }
    __m512i bits = _mm512_setzero_si512();
    PK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512i low = _mm512_and_si512(c[j], low16);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi64(c[j], 16), low16);
      const __m512i bit_low = _mm512_set1_epi64(1 << j), bit_high = _mm512_set1_epi64(16 << j);
      bits = _mm512_mask_or_epi64(bits, _mm512_cmpge_epu64_mask(low, limit), bits, bit_low);
      bits = _mm512_mask_or_epi64(bits, _mm512_cmpge_epu64_mask(high, limit), bits, bit_high);
    }
    _mm_storel_epi64(reinterpret_cast<__m128i*>(mask + i), _mm512_cvtepi64_epi8(bits));
  }
#elif defined(__AVX2__)
  const __m256i m0 = _mm256_set1_epi64x(philox::kM0), m1 = _mm256_set1_epi64x(philox::kM1);
  const __m256i limit = _mm256_set1_epi64x(static_cast<int64_t>(threshold) - 1), low16 = _mm256_set1_epi64x(0xFFFF);
  const __m256i iota = _mm256_setr_epi64x(0, 1, 2, 3);
  for (; i + 4 <= count; i += 4) {
    const __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + i)), iota);
    __m256i c[4] = {counter, _mm256_srli_epi64(counter, 32), _mm256_setzero_si256(), _mm256_setzero_si256()};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < philox::kRounds; ++round, k0 += philox::kW0, k1 += philox::kW1) {
      const __m256i p0 = _mm256_mul_epu32(c[0], m0), p1 = _mm256_mul_epu32(c[2], m1);
      c[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c[1]), _mm256_set1_epi64x(k0));
      c[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c[3]), _mm256_set1_epi64x(k1));
      c[1] = p1;
      c[3] = p0;
    }
    __m256i bits = _mm256_setzero_si256();
    for (int j = 0; j < 4; ++j) {
      const __m256i low = _mm256_and_si256(c[j], low16);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi64(c[j], 16), low16);
      bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_cmpgt_epi64(low, limit), _mm256_set1_epi64x(1 << j)));
      bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_cmpgt_epi64(high, limit), _mm256_set1_epi64x(16 << j)));
    }
    for (int lane = 0; lane < 4; ++lane) mask[i + lane] = static_cast<uint8_t>(reinterpret_cast<int64_t*>(&bits)[lane]);
  }
#endif
  for (; i < count; ++i) mask[i] = philox::mask_byte(seed, first + i, threshold);
}

// rows x cols of a row-major matrix into a chunk, with the columns up to a whole panel zeroed.
template <class K>
static void load_chunk(typename K::Step* chunk, const typename K::Store* src, int64_t ld, int64_t rows, int64_t cols,
                       const uint8_t* mask, int64_t mask_ld, int64_t col) {
  using Elem = typename K::Elem;
  constexpr int64_t ahead = 4;  // rows
  Elem* dst = reinterpret_cast<Elem*>(chunk);
  const int64_t padded = round_up(cols, K::panel);
  for (int64_t i = 0; i < rows; ++i, dst += K::chunk_ld * K::pair) {
    for (int64_t j = 0; i + ahead < rows && j < cols; j += 64 / sizeof(typename K::Store))
      __builtin_prefetch(src + (i + ahead) * ld + j);
    convert(dst, src + i * ld, cols);
    if (mask) apply_mask(dst, mask + i * mask_ld, col, cols);
    for (int64_t j = cols; j < padded; ++j) dst[j] = Elem{};
  }
}

// Two rows of 16-bit elements into one row of pairs; an odd last row is paired with zeros.
static inline void interleave_rows(uint32_t* pairs, int64_t pairs_ld, const uint16_t* rows, int64_t ld, int64_t count,
                                   int64_t cols) {
  for (int64_t i = 0; i < count; i += 2, pairs += pairs_ld) {
    const uint16_t *a = rows + i * ld, *b = a + ld;
    if (i + 1 < count)
      for (int64_t j = 0; j < cols; ++j) pairs[j] = a[j] | static_cast<uint32_t>(b[j]) << 16;
    else
      for (int64_t j = 0; j < cols; ++j) pairs[j] = a[j];
  }
}

// Rows [k0, k1) (k0 a multiple of pair) of one panel of a packed operand Q [steps * pair, width], into `part`:
// element (k, j) is src[k * ld + j]; outside [Kd, J] it is zero.
template <class K>
static void pack_rows(typename K::Step* part, int64_t width, int64_t k0, int64_t k1, const typename K::Store* src, int64_t ld,
                      int64_t Kd, int64_t j0, int64_t J) {
  using Elem = typename K::Elem;
  const int64_t live = min64(width, J - j0);
  constexpr int64_t ahead = 16;  // rows lie pages apart, which the hardware does not foresee
  Elem rows[K::pair * K::panel];
  for (int64_t k = k0; k < k1; k += K::pair) {
    for (int64_t i = k + ahead; i < min64(Kd, k + ahead + K::pair); ++i)
      for (int64_t j = 0; j < live; j += 64 / sizeof(typename K::Store)) __builtin_prefetch(src + i * ld + j0 + j);
    typename K::Step* dst = part + (k - k0) / K::pair * width;
    Elem* into = K::pair == 1 ? reinterpret_cast<Elem*>(dst) : rows;
    for (int64_t i = 0; i < K::pair; ++i) {
      const int64_t valid = k + i < Kd ? live : 0;
      if (valid == K::panel)
        convert(into + i * width, src + (k + i) * ld + j0, K::panel);
      else if (valid)
        convert(into + i * width, src + (k + i) * ld + j0, valid);
      for (int64_t j = valid; j < width; ++j) into[i * width + j] = Elem{};
    }
    if constexpr (K::pair == 2)
      interleave_rows(dst, width, reinterpret_cast<const uint16_t*>(rows), width, 2, width);
  }
}

// The same for element (k, j) = src[j * ld + k].
template <class K>
static void pack_columns(typename K::Step* part, int64_t width, int64_t k0, int64_t k1, const typename K::Store* src,
                         int64_t ld, int64_t Kd, int64_t j0, int64_t J) {
  using Elem = typename K::Elem;
  using Bits = typename BitsOf<sizeof(typename K::Step)>::type;
  constexpr int64_t run = 64 * K::pair;
  alignas(64) Bits lines[K::W * 64];
  for (int64_t j = 0; j < width; j += K::W)
    for (int64_t k = k0; k < k1; k += run) {
      const int64_t n = min64(run, k1 - k), steps = ceil_div(n, K::pair), valid = min64(n, Kd - k);
      for (int64_t lane = 0; lane < K::W; ++lane) {
        Elem* line = reinterpret_cast<Elem*>(lines + lane * 64);
        const int64_t live = j0 + j + lane < J ? valid : 0;
        for (int64_t i = k + n; live && i < min64(Kd, k + n + run); i += 64 / sizeof(typename K::Store))
          __builtin_prefetch(src + (j0 + j + lane) * ld + i);
        if (live) convert(line, src + (j0 + j + lane) * ld + k, live);
        for (int64_t i = live; i < run; ++i) line[i] = Elem{};
      }
      Bits* dst = reinterpret_cast<Bits*>(part + (k - k0) / K::pair * width + j);
      for (int64_t i = 0; i < steps; i += K::W) transpose_block(lines + i, 64, dst + i * width, width, steps - i);
    }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
