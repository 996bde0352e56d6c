// Adapter gradients: products of two tall operands, summed over their rows. Compiled once per instruction set.
#pragma once

#include "low_rank_cpu.h"
#include "micro_kernel_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kLongBlocks = 8;  // of rows, after which a partial sum joins the total

// The chunk as the wide operand of an adapter gradient: rows interleaved where a step holds a pair of them, and their distance.
template <class K>
constexpr int64_t across_rows_ld = K::pair == 2 ? K::pairs_ld : K::chunk_ld;
template <class K>
static const typename K::Step* across_rows(const typename K::Step* chunk, typename K::Step* pairs, int64_t rows, int64_t cols) {
  if constexpr (K::pair == 2) {
    interleave_rows(pairs, K::pairs_ld, reinterpret_cast<const uint16_t*>(chunk), K::chunk_ld * 2, rows,
                    round_up(cols, K::panel));
    return pairs;
  }
  return chunk;
}

// An adapter gradient [panels][height][panel], summed over blocks of rows by one thread for columns `cols`. With a single
// block of rows a panel is final at once, and only one is held.
template <class K>
class OuterSum {
  using Acc = typename K::Acc;
  int64_t height_, first_, last_, blocks_ = 0;
  bool single_;
  Acc *part_, *total_;
  bool fresh_ = true, has_total_ = false;

 public:
  OuterSum(Arena& arena, int64_t height, int64_t columns, Range cols, int64_t rows)
      : height_(height),
        first_(cols.begin / K::panel * height * K::panel),
        last_(ceil_div(cols.end, K::panel) * height * K::panel),
        single_(rows <= kBlockRows),
        part_(arena.take<Acc>((single_ ? K::panel : round_up(columns, K::panel)) * height)),
        total_(ceil_div(rows, kBlockRows) > kLongBlocks ? arena.take<Acc>(round_up(columns, K::panel) * height) : nullptr) {}

  // Adds block[:, :height].T @ chunk [rows, cols] at column `col`. What is final, write(column, count, sums) is given.
  template <class Write>
  void add(const typename K::Step* block, int64_t block_ld, int64_t rows, const typename K::Step* chunk, int64_t col,
           int64_t cols, Write write) {
    const int64_t steps = ceil_div(rows, K::pair), run = kChainRows, chunk_ld = across_rows_ld<K>;
    for (int64_t j = 0; j < cols; j += K::panel) {
      Acc* sums = part_ + (single_ ? 0 : (col + j) / K::panel * height_ * K::panel);
      for (int64_t k = 0; k < steps; k += run)
        tiles<typename K::Math, 4, K::panel_vectors, 1, 0>(height_, min64(run, steps - k), block + k * block_ld, 1, block_ld,
                                                           chunk + k * chunk_ld + j, chunk_ld, sums, K::panel, fresh_ && k == 0);
      if (single_) write(col + j, min64(K::panel, cols - j), sums);
    }
  }

  void end_block() {
    fresh_ = false;
    if (++blocks_ % kLongBlocks == 0 && total_) join();
  }

  // Undefined, and not to be read, for a thread that had no rows.
  const Acc* finish() {
    if (has_total_ && !fresh_) join();
    return has_total_ ? total_ : part_;
  }

 private:
  void join() {
    if (has_total_)
      for (int64_t i = first_; i < last_; ++i) total_[i] += part_[i];
    else
      memcpy(total_ + first_, part_ + first_, (last_ - first_) * sizeof(Acc));
    has_total_ = fresh_ = true;
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
