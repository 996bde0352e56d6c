// The base product on top of the low-rank one, rounded once: out = scaling * drop(rank @ q) + left @ weight + bias.
// Compiled once per instruction set.
#pragma once

#include "../common/gemm_cpu.h"
#include "../common/low_rank_cpu.h"
#include "lora_linear.h"

namespace peft_kernels {
namespace PK_ISA {

// Forward: rank = s, q = B.T, left = x, right = weight.T. Backward: rank = g, q = A, left = dy, right = weight.
template <class K>
struct LoraBase {
  using Acc = typename K::Acc;
  using Step = typename K::Step;
  LeftRows<K> left, rank;
  RightMatrix right;
  int64_t M, J;
  Acc scaling;
  const Acc* bias = nullptr;
  const uint8_t* mask = nullptr;  // [M, mask_ld] or null
  int64_t mask_ld = 0;
  typename K::Store* out = nullptr;

  LoraBase(const Rows& left_, int64_t D, const void* rank_, int64_t R, const RightMatrix& right_, int64_t M_, int64_t J_,
           double scaling_)
      : left(left_, D), rank({rank_, R}, R), right(right_), M(M_), J(J_), scaling(static_cast<Acc>(scaling_)) {
    if (!right.data) left.in_place = rank.in_place = true;  // nothing to be done, no buffers for it
  }

  struct Own {
    GemmOwn<K> gemm;
    Step* rank;
    Own(Arena& arena, const LoraBase& base) : gemm(arena, base.left), rank(arena.take<Step>(base.rank.buffer(kGemmRows))) {}
  };

  // By every thread of the team, when `rank` and the packed q [panels][R steps][panel] are whole.
  void run(const GemmShared<K>& shared, const Own& own, const Step* q) const {
    const int64_t steps = rank.steps();
    const Step* from = nullptr;
    int64_t ld = 0;
    gemm<K>(
        left, right, M, J, shared, own.gemm,
        [&](int64_t m, int64_t rows) { from = rank.block(m, rows, own.rank, &ld); },
        [&](Acc* sums, int64_t m, int64_t rows, int64_t j, int64_t live) {
          expand_panel<K>(from, ld, rows, steps, q + j * steps, sums);
          for (int64_t i = 0; i < rows * K::panel; ++i) sums[i] *= scaling;
          for (int64_t i = 0; mask && i < rows; ++i) apply_mask(sums + i * K::panel, mask + (m + i) * mask_ld, j, live);
        },
        [&](Acc* sums, int64_t m, int64_t rows, int64_t j, int64_t live) {
          for (int64_t i = 0; i < rows; ++i)
            finish_row<K>(sums + i * K::panel, 1, bias ? bias + j : nullptr, out + (m + i) * J + j, live);
        });
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
