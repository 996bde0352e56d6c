// Tiles of sums of rows of x times rows of W, with everything that a tile reads beside each other in memory. Compiled once per
// instruction set.
//
// Rows of x are packed in groups of up to `height`: for each unit of K first the even elements of every row of the group, then
// the odd ones, a vector each. So a tile walks one stream of x from an address that grows by a constant, and its part for a run
// of K fits the first cache whatever the distance between rows.
#pragma once

#include "dot_cpu.h"

#if defined(__AVX2__)
namespace peft_kernels {
namespace PK_ISA {

// Bytes of some rows of W to be fetched little by little, while there is something else to do: column by column of lines.
struct Fetcher {
  const uint8_t* at = nullptr;
  int64_t ld = 0, rows = 0, lines = 0;  // from row to row; how many; lines of a row still to come
  int64_t row = 0, share = 0;           // the next one; how many lines at a time
  void some() {
    for (int64_t i = 0; i < share && lines > 0; ++i) {
      __builtin_prefetch(at + row * ld);
      if (++row == rows) row = 0, at += 64, --lines;
    }
  }
};

// sums[h * sums_ld + r] += x[h] . W[r] over `chunks` chunks, for H rows of x and R of W, both packed.
template <class F, int H, int R>
static inline void multiply_tile(const typename F::X* w, int64_t chunks, const typename F::X* x, float* sums, int64_t sums_ld,
                                 Fetcher& fetcher) {
  // A sum waits for itself as long as a dozen others take: of fewer, each is made in two chains.
  constexpr int chains = H * R >= 12 || PK_VECTOR_BYTES < 64 ? 1 : 2;
  constexpr int64_t vectors = kDotChunk / F::lanes;
  decltype(F::zero()) acc[H * R][chains];
  PK_UNROLL
  for (int i = 0; i < H * R * chains; ++i) (&acc[0][0])[i] = F::zero();
  const auto chunk = [&](int64_t c) __attribute__((always_inline)) {
    PK_UNROLL
    for (int64_t j = 0; j < vectors; ++j) {
      typename F::Vector v[R];
      PK_UNROLL
      for (int r = 0; r < R; ++r) v[r] = F::load(w + ((c * vectors + j) * R + r) * F::lanes);
      PK_UNROLL
      for (int h = 0; h < H; ++h) {
        const typename F::Vector at = F::load(x + ((c * vectors + j) * H + h) * F::lanes);
        PK_UNROLL
        for (int r = 0; r < R; ++r) {
          auto& one = acc[h * R + r][j % chains];
          one = F::madd(one, v[r], at);
        }
      }
    }
  };
  int64_t c = 0;
  for (; c + 2 <= chunks; c += 2) fetcher.some(), chunk(c), chunk(c + 1);
  if (c < chunks) chunk(c);
  decltype(F::zero()) whole[H * R];
  PK_UNROLL
  for (int i = 0; i < H * R; ++i) whole[i] = chains == 2 ? acc[i][0] + acc[i][chains - 1] : acc[i][0];
  add_sums<H, R>(whole, sums, sums_ld);
}

// `chunks` chunks of R rows of W, packed as rows of x are.
template <class F, int R>
static inline void decode_tile(const F& f, const uint8_t* const (&packed)[R], const float* const (&scales)[R], int64_t chunks,
                               typename F::X* to, Fetcher& fetcher) {
  constexpr int64_t units = kDotChunk / (2 * F::lanes);
  for (int64_t c = 0; c < chunks; ++c) {
    if (c % 2 == 0) fetcher.some();
    PK_UNROLL
    for (int64_t u = 0; u < units; ++u, to += 2 * R * F::lanes) {
      PK_UNROLL
      for (int r = 0; r < R; ++r) {
        typename F::Vector v[2];
        decode_unit(f, packed[r] + (c * units + u) * F::lanes, scales[r][c], v);
        F::store(to + r * F::lanes, v[0]), F::store(to + (R + r) * F::lanes, v[1]);
      }
    }
  }
}

// One row of K elements of x, a multiple of a chunk, as row h of a packed group of H.
template <class F>
static void pack_row(typename F::X* group, int64_t H, int64_t h, const typename F::X* row, int64_t K) {
  for (int64_t k = 0; k < K; k += 2 * F::lanes) {
    typename F::Vector v[2];
    F::split(row + k, v);
    F::store(group + k * H + h * F::lanes, v[0]), F::store(group + (k + F::lanes) * H + h * F::lanes, v[1]);
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
#endif
