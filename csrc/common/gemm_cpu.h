// out = finish(start + left @ right) for any right operand that can be packed: a whole GEMM, blocked for the cache.
// Compiled once per instruction set.
//
// Columns of `right` are packed by all threads, a group at a time, and shared. Then each thread multiplies with blocks of
// rows of `left`, first the columns that it packed itself: between cores without a common cache a line travels as slowly as
// from memory. Measured at 64 rows of a 4-bit weight, N = K = 4096, on two cores of a Zen 4 that the host moves about: while
// a line takes 32 ns from one to the other, 5.8 ms, and while it takes 166 ns, 6.2; with columns shared out in turn it was
// 5.9 and 11.7. After its own a thread helps others: a core that is slowed down does less, and who computes a block does not
// change its bits.
//
// Of a tile of 6 rows and one panel the sums stay in registers for a run, then join the block's sums in L1: short chains round
// less than one long one, and cost under 2 % (one load and store of a tile per 256 steps of bf16).
#pragma once

#include "micro_kernel_cpu.h"
#include "packing_cpu.h"
#include "rows.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kGemmHeight = 6;              // rows of a register tile
constexpr int64_t kGemmRows = 48;               // rows per block: their sums for one panel fill a quarter of L1
constexpr int64_t kGemmRun = 128;               // terms per chain; a step of a pair is two, and its results are rounded anyway
constexpr int64_t kGemmRuns = 32;               // runs per second-level sum
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kOwnPanels = 4;  // at least, for a thread to have columns of its own: each reads all of `left` again
constexpr int64_t kGroupBytes = int64_t{4} << 20;  // packed columns at a time: in L3, or L2 where that is large

// The rows of one operand as the micro-kernel broadcasts them: in place where memory already holds whole steps.
template <class K>
struct LeftRows {
  using Step = typename K::Step;
  using Elem = typename K::Elem;
  using Store = typename K::Store;
  const Store* data;
  int64_t row, cols;
  bool in_place;

  LeftRows(const Rows& rows, int64_t cols_) : data(static_cast<const Store*>(rows.data)), row(rows.row), cols(cols_) {
    in_place = sizeof(Store) == sizeof(Elem) && row % K::pair == 0 && cols % K::pair == 0;
  }
  int64_t steps() const { return ceil_div(cols, K::pair); }
  // Of the buffer that `block` needs, in steps.
  int64_t buffer(int64_t rows) const { return in_place ? 0 : rows * steps(); }

  // Rows [m, m + count): where they are, and the distance between them in steps.
  const Step* block(int64_t m, int64_t count, Step* buffer, int64_t* ld) const {
    if (in_place) {
      *ld = row / K::pair;
      return reinterpret_cast<const Step*>(data + m * row);
    }
    *ld = steps();
    for (int64_t i = 0; i < count; ++i) {
      Elem* line = reinterpret_cast<Elem*>(buffer + i * *ld);
      convert(line, data + (m + i) * row, cols);
      for (int64_t k = cols; k < *ld * K::pair; ++k) line[k] = Elem{};
    }
    return buffer;
  }
};

template <class K>
static int64_t group_columns(int64_t steps, int64_t J) {
  const int64_t column = (steps > 0 ? steps : 1) * static_cast<int64_t>(sizeof(typename K::Step));
  const int64_t fit = kGroupBytes / column / K::panel * K::panel;
  return min64(round_up(J, K::panel), fit > K::panel ? fit : K::panel);
}

// Packs columns [j0, j0 + live) of `right` [D, J], shared among the threads.
template <class K>
static void pack_group(typename K::Step* group, const RightMatrix& right, int64_t D, int64_t j0, int64_t live, int threads,
                       int id) {
  const auto* data = static_cast<const typename K::Store*>(right.data);
  const RightMatrix from{data + (right.by_columns ? j0 * right.ld : j0), right.ld, right.by_columns};
  pack<K>(group, ceil_div(live, K::panel), K::panel, from, D, live, threads, id);
}

// sums [rows][panel] += left @ packed panel. After kGemmRuns runs they join `total` [rows][panel], which the end adds back.
template <class K>
static void add_panel(const typename K::Step* left, int64_t ld, int64_t rows, int64_t steps, const typename K::Step* panel,
                      typename K::Acc* sums, typename K::Acc* total) {
  constexpr int64_t run = kGemmRun * K::pair;
  bool fresh = false, has_total = false;
  int64_t runs = 0;
  for (int64_t k = 0; k < steps; k += run) {
    tiles<typename K::Math, kGemmHeight, K::panel_vectors, 0, 1>(rows, min64(run, steps - k), left + k, ld, 1,
                                                                panel + k * K::panel, K::panel, sums, K::panel, fresh);
    fresh = ++runs % kGemmRuns == 0 && k + run < steps;
    if (!fresh) continue;
    for (int64_t i = 0; i < rows * K::panel; ++i) total[i] = has_total ? total[i] + sums[i] : sums[i];
    has_total = true;
  }
  for (int64_t i = 0; has_total && i < rows * K::panel; ++i) sums[i] += total[i];
}

template <class K>
struct GemmShared {
  int64_t columns;  // of a group
  typename K::Step* group;
  Tasks tasks;
  GemmShared(Arena& arena, int64_t steps, int64_t J, int threads)
      : columns(group_columns<K>(steps, J)),
        group(arena.take<typename K::Step>(columns * steps)),
        tasks(arena, 0, threads) {}
};

template <class K>
struct GemmOwn {
  typename K::Step* rows;
  typename K::Acc *sums, *total;
  GemmOwn(Arena& arena, const LeftRows<K>& left)
      : rows(arena.take<typename K::Step>(left.buffer(kGemmRows))),
        sums(arena.take<typename K::Acc>(kGemmRows * K::panel)),
        total(arena.take<typename K::Acc>(kGemmRows * K::panel)) {}
};

// How a group's work is cut: slices of panels, one for each thread that packed them and more where the blocks of rows are too
// few to share out evenly; and blocks of rows, which each slice reads. With `again` that is cheap: they are used where they
// lie.
struct GemmCut {
  int64_t rows, blocks, slice, slices;  // rows per block, panels per slice
  GemmCut(int64_t M, int64_t panels, int threads, bool again) {
    rows = min64(kGemmRows, round_up(ceil_div(M, threads), kGemmHeight));
    blocks = ceil_div(M, rows);
    const int64_t evenly = ceil_div(kTasksPerThread * threads, blocks), owners = min64(threads, ceil_div(panels, kOwnPanels));
    slice = ceil_div(panels, min64(panels, again || evenly > owners ? round_up(evenly, owners) : evenly));
    slices = ceil_div(panels, slice);
  }
};

// To be called by every thread of the team, with M > 0. Per block of rows [m, m + n): block(m, n) first; then for each panel
// of columns start(sums, m, n, j, live) writes sums [n][panel] and finish does with the total what is to be done.
// `right` is a RightMatrix, or any other type for which there is a pack_group.
template <class K, class Right, class Block, class Start, class Finish>
static void gemm(const LeftRows<K>& left, const Right& right, int64_t M, int64_t J, const GemmShared<K>& shared,
                 const GemmOwn<K>& own, Block block, Start start, Finish finish) {
  const int id = thread_id();
  const int64_t steps = left.steps();
  for (int64_t j0 = 0; j0 < J; j0 += shared.columns) {
    const int64_t live = min64(shared.columns, J - j0);
    const GemmCut cut(M, ceil_div(live, K::panel), team_size(), left.in_place);
    const Tasks tasks = shared.tasks.then(cut.slices * cut.blocks);
    tasks.begin(id);
    pack_group<K>(shared.group, right, left.cols, j0, live, team_size(), id);
#pragma omp barrier
    for (int64_t task; (task = tasks.take(id)) < tasks.count();) {
      const int64_t m = task % cut.blocks * cut.rows, rows = min64(cut.rows, M - m);
      const int64_t first = task / cut.blocks * cut.slice * K::panel, last = min64(live, first + cut.slice * K::panel);
      int64_t ld;
      const typename K::Step* from = left.block(m, rows, own.rows, &ld);
      block(m, rows);
      for (int64_t j = first; j < last; j += K::panel) {
        const int64_t n = min64(K::panel, live - j);
        start(own.sums, m, rows, j0 + j, n);
        add_panel<K>(from, ld, rows, steps, shared.group + j * steps, own.sums, own.total);
        finish(own.sums, m, rows, j0 + j, n);
      }
    }
#pragma omp barrier
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
