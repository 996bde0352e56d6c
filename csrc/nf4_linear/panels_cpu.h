// A 4-bit weight as the right operand of the GEMM in gemm_cpu.h: decoded straight into packed panels, a bounded group of
// columns at a time, so that no call ever holds W in another dtype. Compiled once per instruction set.
#pragma once

#include "../common/gemm_cpu.h"
#include "../common/nf4_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

// W [N, K] of a flat 4-bit tensor. Forward multiplies by its transpose: columns of the right operand are rows of W.
struct Nf4Right {
  Nf4Weight weight;
  int64_t K;
  bool transposed;
};

constexpr int64_t kNf4Wide = 4;  // panels decoded side by side in the backward: two cache lines of a row of W

// Rows of W as columns: runs of each row of W, a vector's worth of rows, and transposed in registers.
template <class K>
static void decode_columns(typename K::Step* part, int64_t k0, int64_t k1, const Nf4Right& right, int64_t D, int64_t j0,
                           int64_t live) {
  using Elem = typename K::Elem;
  using Bits = typename BitsOf<sizeof(typename K::Step)>::type;
  constexpr int64_t run = 64 * K::pair, width = K::panel;
  alignas(64) Bits lines[K::W * 64];
  for (int64_t k = k0; k < k1; k += run) {
    const int64_t steps = ceil_div(min64(run, k1 - k), K::pair), valid = min64(min64(run, k1 - k), D - k);
    for (int64_t j = 0; j < width; j += K::W) {
      for (int64_t lane = 0; lane < K::W; ++lane) {
        Elem* line = reinterpret_cast<Elem*>(lines + lane * 64);
        const int64_t filled = j + lane < live ? valid : 0;
        if (filled) nf4_decode(right.weight, (j0 + j + lane) * right.K + k, filled, line);
        for (int64_t i = filled; i < steps * K::pair; ++i) line[i] = Elem{};
      }
      Bits* dst = reinterpret_cast<Bits*>(part + (k - k0) / K::pair * width + j);
      for (int64_t i = 0; i < steps; i += K::W) transpose_block(lines + i, 64, dst + i * width, width, steps - i);
    }
  }
}

// Rows of W as rows: `panels` of them side by side, `steps` apart in memory, two rows of bf16 interleaved.
template <class K>
static void decode_rows(typename K::Step* part, int64_t panels, int64_t steps, int64_t k0, int64_t k1, const Nf4Right& right,
                        int64_t D, int64_t j0, int64_t live) {
  using Elem = typename K::Elem;
  constexpr int64_t width = K::panel, wide = kNf4Wide * width, ahead = 16;  // rows lie pages apart: fetched by hand
  alignas(64) Elem rows[K::pair * wide];
  for (int64_t k = k0; k < k1; k += K::pair) {
    for (int64_t i = 0; i < K::pair; ++i) {
      const int64_t valid = k + i < D ? live : 0, first = (k + i) * right.K + j0;
      const int64_t later = first + ahead * right.K;
      if (k + i + ahead < D)
        for (int64_t j = 0; j < live; j += 128) __builtin_prefetch(right.weight.packed + (later + j) / 2);
      if (valid) nf4_decode(right.weight, first, valid, rows + i * wide);
      for (int64_t j = valid; j < panels * width; ++j) rows[i * wide + j] = Elem{};
    }
    for (int64_t p = 0; p < panels; ++p) {
      typename K::Step* dst = part + p * steps * width + (k - k0) / K::pair * width;
      if constexpr (K::pair == 2)
        interleave_rows(dst, width, reinterpret_cast<const uint16_t*>(rows) + p * width, wide, 2, width);
      else
        memcpy(dst, rows + p * width, width * sizeof(Elem));
    }
  }
}

// Packs columns [j0, j0 + live) of the right operand [D, J] for gemm(), shared among the threads: neighbours by one.
template <class K>
static void pack_group(typename K::Step* group, const Nf4Right& right, int64_t D, int64_t j0, int64_t live, int threads,
                       int id) {
  const int64_t even = round_up(D, K::pair), runs = ceil_div(even, kPackRun), at_once = right.transposed ? 1 : kNf4Wide;
  const int64_t panels = ceil_div(live, K::panel), sets = ceil_div(panels, at_once);
  const int64_t end = part_start(sets * runs, id + 1, threads);
  for (int64_t task = part_start(sets * runs, id, threads); task < end; ++task) {
    const int64_t p = task / runs * at_once, k0 = task % runs * kPackRun, k1 = min64(even, k0 + kPackRun);
    typename K::Step* part = group + (p * even + k0) / K::pair * K::panel;
    const int64_t first = j0 + p * K::panel, here = min64(at_once * K::panel, live - p * K::panel);
    if (right.transposed)
      decode_columns<K>(part, k0, k1, right, D, first, here);
    else
      decode_rows<K>(part, min64(at_once, panels - p), even / K::pair, k0, k1, right, D, first, here);
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
