// Right operands of products, packed in panels of columns as the micro-kernel reads them. Compiled once per instruction set.
#pragma once

#include "tasks_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kPackRun = 256;  // reduction rows packed per task

// A right operand Q [rows, cols] in memory: element (k, j) is data[k * ld + j], or data[j * ld + k] if `by_columns`.
struct RightMatrix {
  const void* data;
  int64_t ld;
  bool by_columns;
};

// Rows [k0, k1) of the panel of `width` columns from j0 on.
template <class K>
static void pack_part(typename K::Step* part, int64_t width, int64_t k0, int64_t k1, const RightMatrix& q, int64_t rows,
                      int64_t j0, int64_t cols) {
  const auto* data = static_cast<const typename K::Store*>(q.data);
  if (q.by_columns)
    pack_columns<K>(part, width, k0, k1, data, q.ld, rows, j0, cols);
  else
    pack_rows<K>(part, width, k0, k1, data, q.ld, rows, j0, cols);
}

// Packs all panels [panels][steps][width] of q [rows, cols], shared among the threads: neighbours by one.
template <class K>
static void pack(typename K::Step* dst, int64_t panels, int64_t width, const RightMatrix& q, int64_t rows, int64_t cols,
                 int threads, int id) {
  const int64_t even = round_up(rows, K::pair), runs = ceil_div(even, kPackRun);
  const int64_t end = part_start(panels * runs, id + 1, threads);
  for (int64_t task = part_start(panels * runs, id, threads); task < end; ++task) {
    const int64_t panel = task / runs, k0 = task % runs * kPackRun, k1 = min64(even, k0 + kPackRun);
    pack_part<K>(dst + (panel * even + k0) / K::pair * width, width, k0, k1, q, rows, panel * width, cols);
  }
}

// Panels of q [rows, cols]: all packed by the team before they are read; or, for a single block of rows, which reads each once,
// a part at a time by its reader, whose cache it stays in. Not to be asked for what is not needed: nothing is there then.
template <class K>
struct Panels {
  using Step = typename K::Step;
  RightMatrix q;
  int64_t rows, cols, count, width;
  bool whole;
  Step* packed;  // [count][steps][width] if whole

  Panels(Arena& arena, bool whole_, const RightMatrix& q_, int64_t rows_, int64_t cols_, int64_t count_, int64_t width_)
      : q(q_), rows(rows_), cols(cols_), count(count_), width(width_), whole(whole_),
        packed(arena.take<Step>(whole ? count * steps() * width : 0)) {}

  int64_t steps() const { return ceil_div(rows, K::pair); }
  // Of the buffer that `get` needs for up to `most` steps, in steps.
  int64_t buffer(int64_t most) const { return whole ? 0 : min64(most, steps()) * width; }

  void prepare(int threads, int id) const {
    if (whole) pack<K>(packed, count, width, q, rows, cols, threads, id);
  }

  // Steps [first, first + n) of a panel.
  const Step* get(int64_t panel, int64_t first, int64_t n, Step* into) const {
    if (whole) return packed + (panel * steps() + first) * width;
    pack_part<K>(into, width, first * K::pair, (first + n) * K::pair, q, rows, panel * width, cols);
    return into;
  }
};

}  // namespace PK_ISA
}  // namespace peft_kernels
