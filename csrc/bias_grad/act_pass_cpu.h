// The activation pass: dz[m, n] = dy[m, n] * act'(z[m, n]), dbias[n] = the sum over m of that before its rounding. Compiled once
// per instruction set.
//
// Rows are cut into blocks by the matrix's shape alone, columns into tiles, threads take these tasks as they are free, and
// the blocks' sums are added in their order: the same bits for every number of threads, with dz or without. Error of a sum:
// a term takes kActStreams rows' tree (2 roundings) and a chain of fp32 sums (kChain - 1), then fp64: 12 at most.
#pragma once

#include "../common/results_cpu.h"
#include "../common/tasks_cpu.h"
#include "../common/workspace_cpu.h"
#include "act.h"
#include "act_slots_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

constexpr int64_t kActStreams = 4;  // rows taken at a time: three streams of memory each
constexpr int64_t kTileCols = 4096, kFewestCols = 256;  // a chain of a tile (fp32) stays in L1, its totals (fp64) in L2
constexpr int64_t kRowBlocks = 32, kFewestRows = kActStreams * kChain;
constexpr int64_t kTasks = 16;  // wanted at least, for threads to share

// Rows of dy (elements), of what was kept (bytes) and of dz (elements): where they begin, or how far they are apart.
template <class T>
struct Rows3 {
  const T* dy;
  const uint8_t* kept;
  T* dz;
};
struct Apart {
  int64_t dy, kept, dz;
  Apart operator*(int64_t n) const { return {dy * n, kept * n, dz * n}; }
};

template <class T, class Act>
struct Pass {
  using At = Rows3<T>;
  bool with_dz, with_sums, uncached;

  static int64_t kept_bytes(int64_t columns) {
    return Act::bits ? columns / 8 : columns * static_cast<int64_t>(sizeof(T));
  }
  static At columns_on(At at, int64_t n) { return {at.dy + n, at.kept + kept_bytes(n), at.dz + n}; }
  static At rows_on(At at, Apart apart) { return {at.dy + apart.dy, at.kept + apart.kept, at.dz + apart.dz}; }

  // One slot of `streams` rows: dz, and the sum of the products.
  template <bool DZ, int streams>
  PK_INLINE static Pair slot(At at, Apart apart, bool uncached) {
    if constexpr (streams == 1) {
      __builtin_prefetch(reinterpret_cast<const char*>(at.dy) + kAhead);
      if constexpr (kSlot * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const char*>(at.dy) + kAhead + 64);
      if constexpr (!Act::bits) {
        __builtin_prefetch(at.kept + kAhead);
        if constexpr (kSlot * sizeof(T) > 64) __builtin_prefetch(at.kept + kAhead + 64);
      }
      const Pair product = Act::template product<T>(at.dy, at.kept);
      if constexpr (DZ) store_product<Act::bits>(at.dz, product, uncached);
      return product;
    } else {
      const Pair first = slot<DZ, streams / 2>(at, apart, uncached);
      return first + slot<DZ, streams / 2>(rows_on(at, apart * (streams / 2)), apart, uncached);
    }
  }

  // The same of the last columns, fewer than a slot, through memory of a slot's size.
  template <bool DZ, int streams>
  static inline Pair short_slot(At at, Apart apart, int64_t columns) {
    if constexpr (streams == 1) {
      T dy[kSlot] = {}, dz[kSlot];
      alignas(T) uint8_t kept[kSlot * sizeof(T)] = {};
      memcpy(dy, at.dy, columns * sizeof(T));
      memcpy(kept, at.kept, Act::bits ? ceil_div(columns, 8) : kept_bytes(columns));
      const Pair product = Act::template product<T>(dy, kept);
      if constexpr (DZ) {
        store_product<Act::bits>(dz, product, false);
        memcpy(at.dz, dz, columns * sizeof(T));
      }
      return product;
    } else {
      const Pair first = short_slot<DZ, streams / 2>(at, apart, columns);
      return first + short_slot<DZ, streams / 2>(rows_on(at, apart * (streams / 2)), apart, columns);
    }
  }

  template <bool DZ, bool Sums, int streams>
  static void row_of(At at, Apart apart, int64_t columns, float* chain, bool first, bool uncached) {
    const int64_t full = columns / kSlot * kSlot;
    if (!Sums || first)
      for (int64_t n = 0; n < full; n += kSlot) {
        const Pair sum = slot<DZ, streams>(columns_on(at, n), apart, uncached);
        if constexpr (Sums) store_pair(chain + n, sum);
      }
    else
      for (int64_t n = 0; n < full; n += kSlot)
        store_pair(chain + n, load_pair(chain + n) + slot<DZ, streams>(columns_on(at, n), apart, uncached));
    if (full == columns) return;
    const Pair sum = short_slot<DZ, streams>(columns_on(at, full), apart, columns - full);
    if constexpr (Sums) store_pair(chain + full, first ? sum : load_pair(chain + full) + sum);
  }

  template <int streams>
  void row(At at, Apart apart, int64_t columns, float* chain, bool first) const {
    if (!with_sums) return row_of<true, false, streams>(at, apart, columns, chain, first, uncached);
    if (with_dz) return row_of<true, true, streams>(at, apart, columns, chain, first, uncached);
    row_of<false, true, streams>(at, apart, columns, chain, first, uncached);
  }
};

// Rows of `cols` columns each, in memory as `f` says, or `group` of f's rows at a time as one wide row.
template <class T, class Act>
struct Matrix {
  using Rows = Pass<T, Act>;
  using At = typename Rows::At;
  const ActBwd& f;
  At origin;
  Apart next;  // row
  int64_t rows, cols, block_rows, blocks, tiles;

  Matrix(const ActBwd& f_, int64_t first_row, int64_t rows_, int64_t group) : f(f_), rows(rows_), cols(f_.N * group) {
    const int64_t kept_size = Act::bits ? 1 : sizeof(T);
    origin.dy = static_cast<const T*>(f.dy) + first_row * f.dy_row;
    origin.kept = static_cast<const uint8_t*>(f.kept) + first_row * f.kept_row * kept_size;
    origin.dz = static_cast<T*>(f.dz) + first_row * f.N;
    next = Apart{f.dy_row, f.kept_row * kept_size, f.N} * group;
    const int64_t even = ceil_div(rows, kRowBlocks);
    block_rows = even < kFewestRows ? kFewestRows : even;
    blocks = ceil_div(rows, block_rows);
    tiles = ceil_div(cols, kTileCols);
    const int64_t more = min64(ceil_div(kTasks, blocks), cols / kFewestCols);
    if (tiles < more) tiles = more;
  }
  int64_t tasks() const { return blocks * tiles; }
  int64_t begin(int64_t tile) const { return tile == tiles ? cols : cols * tile / tiles / 64 * 64; }
  int64_t stride() const { return round_up(cols, 64); }  // between the sums of blocks
  bool unit_columns() const { return (f.dy_col == 1 || f.N == 1) && (Act::bits || f.kept_col == 1 || f.N == 1); }
  bool uncached() const {
    return goes_past_cache(f.dz, f.M, f.N * static_cast<int64_t>(sizeof(T)));
  }
};

// Per thread: a tile's chain, and rows gathered from columns that lie apart.
template <class T>
struct Scratch {
  static constexpr int64_t size = kTileCols + 64;
  float* chain;
  T *dy, *z;
  Scratch(Arena& a, bool gathers)
      : chain(a.take<float>(size)),
        dy(a.take<T>(gathers ? kActStreams * size : 0)),
        z(a.take<T>(gathers ? kActStreams * size : 0)) {}
};

template <class T>
static void gather(T* row, const T* from, int64_t apart, int64_t columns) {
  for (int64_t n = 0; n < columns; ++n) row[n] = from[n * apart];
}

template <class T, class Act, int streams>
void step(const Matrix<T, Act>& w, const Pass<T, Act>& pass, int64_t row, int64_t apart, int64_t col, int64_t columns,
          const Scratch<T>& own, bool first) {
  using Rows = Pass<T, Act>;
  const auto start = Rows::rows_on(w.origin, w.next * row);
  auto at = Rows::columns_on(start, col);
  if (w.unit_columns()) return pass.template row<streams>(at, w.next * apart, columns, own.chain, first);
  Apart between = w.next * apart;
  for (int64_t s = 0; s < streams; ++s) {
    gather(own.dy + s * own.size, start.dy + s * between.dy + col * w.f.dy_col, w.f.dy_col, columns);
    if constexpr (!Act::bits)
      gather(own.z + s * own.size, reinterpret_cast<const T*>(start.kept + s * between.kept) + col * w.f.kept_col,
             w.f.kept_col, columns);
  }
  at.dy = own.dy, between.dy = own.size;
  if constexpr (!Act::bits) at.kept = reinterpret_cast<const uint8_t*>(own.z), between.kept = own.size * sizeof(T);
  pass.template row<streams>(at, between, columns, own.chain, first);
}

// One task: rows of a block, columns of a tile; total: their sums.
template <class T, class Act>
void run_task(const Matrix<T, Act>& w, const Pass<T, Act>& pass, int64_t task, const Scratch<T>& own, double* parts) {
  const int64_t block = task / w.tiles, tile = task % w.tiles, col = w.begin(tile), columns = w.begin(tile + 1) - col;
  const int64_t row = block * w.block_rows, rows = min64(w.block_rows, w.rows - row), steps = rows / kActStreams;
  const int64_t size = round_up(columns, kSlot);
  double* total = parts + block * w.stride() + col;
  for (int64_t begin = 0; begin < steps; begin += kChain) {
    for (int64_t i = begin; i < min64(begin + kChain, steps); ++i)
      step<T, Act, kActStreams>(w, pass, row + i, steps, col, columns, own, i == begin);
    if (pass.with_sums) fold(own.chain, size, total, begin == 0);
  }
  const int64_t rest = steps * kActStreams;
  for (int64_t i = rest; i < rows; ++i) step<T, Act, 1>(w, pass, row + i, 0, col, columns, own, i == rest);
  if (pass.with_sums && rest < rows) fold(own.chain, size, total, rest == 0);
}

// What a matrix's pass needs: the blocks' sums, and each thread's own.
template <class T, class Act>
struct Memory {
  int threads;
  int64_t parts, own;  // bytes
  Memory(const Matrix<T, Act>& w) : threads(static_cast<int>(min64(w.f.threads, w.tasks()))) {
    Arena shared{nullptr}, per_thread{nullptr};
    shared.take<double>(w.f.dbias ? w.blocks * w.stride() : 0);
    const Scratch<T> measured(per_thread, !w.unit_columns());
    parts = shared.used, own = per_thread.used;
  }
  int64_t bytes() const { return parts + threads * own; }
};

// columns [w.cols]: the sums; not written where they are not asked for. memory: Memory(w).bytes().
template <class T, class Act>
void run_matrix(const Matrix<T, Act>& w, double* columns, char* memory) {
  const Pass<T, Act> pass{w.f.dz != nullptr, w.f.dbias != nullptr, w.uncached()};
  const Memory<T, Act> sizes(w);
  double* parts = reinterpret_cast<double*>(memory);
#pragma omp parallel num_threads(sizes.threads)
  {
    Arena arena{memory + sizes.parts + thread_id() * sizes.own};
    const Scratch<T> own(arena, !w.unit_columns());
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < w.tasks(); ++task) run_task(w, pass, task, own, parts);
    if (pass.uncached) finish_stores();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t slot = 0; slot < (pass.with_sums ? ceil_div(w.cols, kSlot) : 0); ++slot) {
      double sums[kSlot] = {};
      for (int64_t b = 0; b < w.blocks; ++b)
        for (int64_t i = 0; i < kSlot; ++i) sums[i] += parts[b * w.stride() + slot * kSlot + i];
      for (int64_t i = 0; i < min64(kSlot, w.cols - slot * kSlot); ++i)
        columns[slot * kSlot + i] = sums[SlotOrder<T>::place(i)];
    }
  }
}

// Narrow rows without gaps are taken `group` at a time, as one wide row.
template <class T, class Act>
void run_bwd(const ActBwd& f) {
  const bool dense = f.M == 1 || (f.dy_row == f.N && (f.dy_col == 1 || f.N == 1) &&
                                  (Act::bits ? f.N % 8 == 0 && f.kept_row == f.N / 8
                                             : f.kept_row == f.N && (f.kept_col == 1 || f.N == 1)));
  const int64_t group = dense && f.N < kTileCols ? min64(f.M, kTileCols / f.N) : 1;
  const int64_t rest = f.M % group;
  const Matrix<T, Act> wide(f, 0, f.M / group, group), last(f, f.M - rest, 1, rest > 0 ? rest : 1);
  const int64_t passes = round_up(Memory(wide).bytes() + (rest > 0 ? Memory(last).bytes() : 0), 64);
  Workspace space(passes + (f.dbias ? (group + rest + 1) * f.N * sizeof(double) : 0));
  char* memory = static_cast<char*>(space.memory);
  double *sums = reinterpret_cast<double*>(memory + passes), *of_rest = sums + group * f.N, *total = of_rest + rest * f.N;
  run_matrix(wide, sums, memory);
  if (rest > 0) run_matrix(last, of_rest, memory);
  if (!f.dbias) return;
  if (group == 1) return write_as(f.out_dtype, f.dbias, 0, sums, f.N);
  for (int64_t n = 0; n < f.N; ++n) total[n] = 0;
  for (int64_t g = 0; g < group + rest; ++g)
    for (int64_t n = 0; n < f.N; ++n) total[n] += sums[g * f.N + n];
  write_as(f.out_dtype, f.dbias, 0, total, f.N);
}

}  // namespace
}  // namespace PK_ISA
}  // namespace peft_kernels
