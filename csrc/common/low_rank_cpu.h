// Products with one short side (a rank), blocked for the cache: the parts that low-rank kernels are made of.
// Compiled once per instruction set.
#pragma once

#include "micro_kernel_cpu.h"
#include "packing_cpu.h"
#include "results_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kLongChain = 2048;  // terms after which a partial sum of s or g joins the total

// The rank dimension as vector lanes: panels of 1 .. panel_vectors vectors.
template <class K>
struct RankLanes {
  int64_t vectors, panels, width, padded;
  explicit RankLanes(int64_t R) {
    const int64_t all = ceil_div(R, K::W);
    panels = ceil_div(all, K::panel_vectors);
    vectors = ceil_div(all, panels);
    width = vectors * K::W;
    padded = panels * width;
  }
};

struct Range {
  int64_t begin, end;
};

// What thread `id` of `threads` works on. Many rows: its own rows, all columns; adapter gradients are added over threads.
// Few rows: all rows, its own columns; sums over columns are added over threads.
struct Split {
  int threads, id;
  int64_t M;
  bool columns;
  Split(int64_t M_, int threads_, int id_) : threads(threads_), id(id_), M(M_), columns(threads > 1 && M <= kBlockRows) {}

  Range rows() const { return columns ? Range{0, M} : share(M, 8); }
  // A multiple of every panel and of a byte of the dropout mask.
  Range cols(int64_t total) const { return columns ? share(total, 64) : Range{0, total}; }
  // How many threads have rows of their own.
  int owners() const { return columns ? M > 0 : static_cast<int>(ceil_div(M, per_thread(M, 8))); }

 private:
  int64_t per_thread(int64_t total, int64_t unit) const { return round_up(ceil_div(total, threads), unit) + (total == 0); }
  Range share(int64_t total, int64_t unit) const {
    const int64_t size = per_thread(total, unit), begin = min64(total, id * size);
    return {begin, min64(total, begin + size)};
  }
};

// sum[m, r] over chunks of columns, with partial sums joined every kLongChain terms.
template <class K>
class RankSum {
  using Acc = typename K::Acc;
  static constexpr int64_t kRun = K::chain / K::pair;
  RankLanes<K> lanes_;
  const Panels<K>& q_;
  Acc *part_, *total_, *joint_;
  typename K::Step* packed_;
  int64_t terms_ = 0;
  bool has_total_ = false;

 public:
  RankSum(Arena& arena, int64_t R, const Panels<K>& q)
      : lanes_(R),
        q_(q),
        part_(arena.take<Acc>(kBlockRows * lanes_.padded)),
        total_(arena.take<Acc>(kBlockRows * lanes_.padded)),
        joint_(arena.take<Acc>(kBlockRows * lanes_.padded)),
        packed_(arena.take<typename K::Step>(q.buffer(kRun))) {}

  void reset() {
    terms_ = 0;
    has_total_ = false;
  }

  // Adds chunk [rows, steps] times steps [step0, step0 + steps) of q.
  void add(const typename K::Step* chunk, int64_t rows, int64_t steps, int64_t step0) {
    for (int64_t k = 0; k < steps; k += kRun) {
      const int64_t n = min64(kRun, steps - k);
      for (int64_t p = 0; p < lanes_.panels; ++p)
        product(rows, n, chunk + k, q_.get(p, step0 + k, n, packed_), part_ + p * lanes_.width);
      terms_ += K::chain;
      if (terms_ == kLongChain) join(rows);
    }
  }

  // The sums [rows][ld()].
  const Acc* finish(int64_t rows) {
    if (has_total_ || terms_ == 0) join(rows);
    return has_total_ ? total_ : part_;
  }
  int64_t ld() const { return lanes_.padded; }

  // The sums over all columns when each thread has summed its own: to be called by every thread of the team.
  const Acc* finish(int64_t rows, const Split& split, const void** parts) {
    const Acc* own = finish(rows);
    if (!split.columns) return own;
    parts[split.id] = own;
#pragma omp barrier
    memcpy(joint_, parts[0], rows * lanes_.padded * sizeof(Acc));
    for (int t = 1; t < split.threads; ++t)
      for (int64_t i = 0; i < rows * lanes_.padded; ++i) joint_[i] += static_cast<const Acc*>(parts[t])[i];
    return joint_;
  }

 private:
  void product(int64_t rows, int64_t steps, const typename K::Step* p, const typename K::Step* q, Acc* c) {
    using Math = typename K::Math;
    constexpr bool wide = PK_VECTOR_BYTES == 64;
    const bool first = terms_ == 0;
    const int64_t w = lanes_.width, ld = lanes_.padded;
    switch (lanes_.vectors) {
      case 1: tiles<Math, wide ? 24 : 12, 1, K::chunk_ld, 1>(rows, steps, p, 0, 1, q, w, c, ld, first); break;
      case 2: tiles<Math, wide ? 12 : 6, 2, K::chunk_ld, 1>(rows, steps, p, 0, 1, q, w, c, ld, first); break;
      default:
        if constexpr (wide) {
          if (lanes_.vectors == 3)
            tiles<Math, 8, 3, K::chunk_ld, 1>(rows, steps, p, 0, 1, q, w, c, ld, first);
          else
            tiles<Math, 6, 4, K::chunk_ld, 1>(rows, steps, p, 0, 1, q, w, c, ld, first);
        }
    }
  }

  void join(int64_t rows) {
    for (int64_t i = 0; i < rows * lanes_.padded; ++i) {
      const Acc part = terms_ ? part_[i] : Acc(0);
      total_[i] = has_total_ ? total_[i] + part : part;
    }
    has_total_ = true;
    terms_ = 0;
  }
};

// A block of s or g, rounded to the storage type, in the two layouts that the micro-kernel broadcasts from.
template <class K>
struct RankBlock {
  using Elem = typename K::Elem;
  int64_t R, ld;               // of by_row, in steps
  int64_t columns_ld;          // of by_column, in steps
  typename K::Step* by_row;    // [rows][ld]: terms are neighbours along r
  typename K::Step* by_column; // [rows / pair][columns_ld]: terms are neighbours along rows
  typename K::Store* rounded;  // one row

  RankBlock(Arena& arena, int64_t R_) : R(R_) {
    ld = columns_ld = round_up(R + 1, 8);
    by_row = arena.take<typename K::Step>(kBlockRows * ld);
    by_column = K::pair == 1 ? by_row : arena.take<typename K::Step>(kBlockRows * columns_ld);
    rounded = arena.take<typename K::Store>(R + 1);
  }

  int64_t row_steps() const { return ceil_div(R, K::pair); }

  void set_row(int64_t m, const typename K::Store* src) {
    Elem* row = reinterpret_cast<Elem*>(by_row) + m * ld * K::pair;
    convert(row, src, R);
    if constexpr (K::pair == 2) {
      row[R] = Elem{};
      Elem* column = reinterpret_cast<Elem*>(by_column) + (m / 2 * columns_ld) * 2 + m % 2;
      for (int64_t r = 0; r < R; ++r) column[r * 2] = row[r];
    }
  }

  // Column R of by_column: ones, whose product with dy is dbias.
  void set_ones(int64_t rows) {
    Elem one;
    const typename K::Acc value = 1;
    convert(&one, &value, 1);
    for (int64_t m = 0; m < rows; ++m)
      reinterpret_cast<Elem*>(by_column)[(m / K::pair * columns_ld + R) * K::pair + m % K::pair] = one;
  }

  // An odd number of rows leaves half a pair, which must not hold an old value (its partner is zero, but 0 * inf is not).
  void close(int64_t rows) {
    if constexpr (K::pair == 2) {
      if (rows % 2)
        for (int64_t r = 0; r <= R; ++r) reinterpret_cast<Elem*>(by_column)[(rows / 2 * columns_ld + r) * 2 + 1] = Elem{};
    }
  }

  // Rounds sums [rows][sum_ld], also into `out` [rows][R] if given.
  void round_from(const typename K::Acc* sums, int64_t sum_ld, int64_t rows, typename K::Store* out) {
    for (int64_t m = 0; m < rows; ++m) {
      typename K::Store* row = out ? out + m * R : rounded;
      convert(row, sums + m * sum_ld, R);
      set_row(m, row);
    }
    close(rows);
  }
};

// sums [rows][panel] = rows of steps, `ld` apart, times one packed panel [steps][panel].
template <class K>
static void expand_panel(const typename K::Step* rows_of, int64_t ld, int64_t rows, int64_t steps, const typename K::Step* q,
                         typename K::Acc* sums) {
  for (int64_t k = 0; k < steps; k += K::chain)
    tiles<typename K::Math, 6, K::panel_vectors, 0, 1>(rows, min64(K::chain, steps - k), rows_of + k, ld, 1, q + k * K::panel,
                                                       K::panel, sums, K::panel, k == 0);
}

// Columns `range` of out[rows, J] = factor * drop(block @ q) + bias. `packed` is a buffer for a panel of q.
template <class K>
static void expand(const RankBlock<K>& block, int64_t rows, const Panels<K>& q, Range range, double factor,
                   const typename K::Acc* bias, const uint8_t* mask, int64_t mask_ld, typename K::Store* out,
                   typename K::Acc* scratch, typename K::Step* packed) {
  constexpr int64_t width = K::panel, height = 6;
  const int64_t steps = block.row_steps(), group = steps <= K::chain ? height : rows;
  const auto scale = static_cast<typename K::Acc>(factor);
  for (int64_t j0 = range.begin; j0 < range.end; j0 += width) {
    const int64_t live = min64(width, range.end - j0);
    const typename K::Step* panel = q.get(j0 / width, 0, steps, packed);
    for (int64_t m = 0; m < rows; m += group) {
      const int64_t n = min64(group, rows - m);
      expand_panel<K>(block.by_row + m * block.ld, block.ld, n, steps, panel, scratch);
      for (int64_t i = 0; i < n; ++i) {
        typename K::Acc* row = scratch + i * width;
        typename K::Store* to = out + (m + i) * q.cols + j0;
        if (mask) apply_mask(row, mask + (m + i) * mask_ld, j0, live);
        finish_row<K>(row, scale, bias ? bias + j0 : nullptr, to, live);
      }
    }
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
