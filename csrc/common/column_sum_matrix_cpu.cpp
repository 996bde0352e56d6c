// The sums of a matrix's columns on a CPU: a bias gradient is those of dy. This file is compiled once per instruction set (PK_ISA).
//
// The matrix is cut into tasks by its shape alone, threads take them as they are free, and the tasks' sums are added in their
// order: the same bits for every number of threads. What bounds it is one read of it. Measured on two cores of a Zen 5 at
// [8192, 4096]: one row after another, or neighbouring rows side by side, whose streams end after 8 KB each, reach 65-85 % of a
// plain read loop; four streams that run on through rows of their own 83 % (bf16, the memory at its fastest) to 117 %. Narrower
// tiles, eight streams and prefetching while totals are added are slower or the same.
#include "column_sum.h"
#include "column_sum_cpu.h"
#include "results_cpu.h"
#include "tasks_cpu.h"
#include "workspace_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

constexpr int64_t kTileCols = 4096;  // a chain of it (fp32) stays in L1, its totals (fp64) in L2
constexpr int64_t kRowBlocks = 32;   // at most: at 8192 rows of 16 bits their sums add 1 % to what is read
constexpr int64_t kFewestRows = kStreams * kChain;
constexpr int64_t kStridedCols = 64, kLineRun = 1 << 16;

int64_t rows_of_a_block(int64_t rows) {
  const int64_t even = ceil_div(rows, kRowBlocks);
  return even < kFewestRows ? kFewestRows : even;
}

// Unit column stride. Narrow rows without gaps are read `group` at a time, as one wide row.
struct Wide {
  static constexpr int64_t tile_size = kTileCols + 64;  // the most a tile can hold; off the power of two
  int64_t group, rows, cols, row_stride, block_rows, blocks, tiles;
  explicit Wide(const ColumnSum& f) {
    const bool dense = f.row == f.N || f.M == 1;
    group = dense && f.N < kTileCols ? min64(f.M, kTileCols / f.N) : 1;
    rows = f.M / group, cols = f.N * group, row_stride = group == 1 ? f.row : cols;
    block_rows = rows_of_a_block(rows);
    blocks = ceil_div(rows, block_rows);
    tiles = ceil_div(cols, kTileCols);
  }
  bool fits() const { return cols >= kSlot; }
  int64_t begin(int64_t tile) const { return tile == tiles ? cols : cols * tile / tiles / 64 * 64; }
  Slots slots(int64_t tile) const { return {begin(tile + 1) - begin(tile)}; }
  int64_t stride() const { return tiles * tile_size; }  // between the sums of blocks
};

// One slot's columns, in their own order: the blocks' sums added.
template <class T>
void join(const float* parts, int64_t blocks, int64_t stride, double* columns) {
  double sums[kSlot] = {};
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < kSlot; ++i) sums[i] += parts[b * stride + i];
  for (int64_t i = 0; i < kSlot; ++i) columns[i] = sums[SlotOrder<T>::place(i)];
}

template <class T>
void sum_wide(const ColumnSum& f, const Wide& w) {
  const T* matrix = static_cast<const T*>(f.matrix);
  struct Shared {
    float* parts;
    double *columns, *tail;  // of wide rows, and of the rows that fill no wide one
    Shared(Arena& a, const ColumnSum& f, const Wide& w)
        : parts(a.take<float>(w.blocks * w.stride())),
          columns(a.take<double>(w.group == 1 ? 0 : w.cols)),
          tail(a.take<double>(w.group == 1 ? 0 : f.N)) {}
  };
  struct Own {
    float* chain;
    double* total;
    explicit Own(Arena& a) : chain(a.take<float>(Wide::tile_size)), total(a.take<double>(Wide::tile_size)) {}
  };
  Arena shared_size{nullptr}, own_size{nullptr};
  const Shared measured(shared_size, f, w);
  const Own measured_own(own_size);
  Workspace space(shared_size.used + f.threads * own_size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const Shared shared(arena, f, w);
  const int64_t tile_slots = Wide::tile_size / kSlot;
#pragma omp parallel num_threads(f.threads)
  {
    Arena own_arena{static_cast<char*>(space.memory) + shared_size.used + thread_id() * own_size.used};
    const Own own(own_arena);
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < w.blocks * w.tiles; ++task) {
      const int64_t block = task / w.tiles, tile = task % w.tiles, row = block * w.block_rows;
      const Slots slots = w.slots(tile);
      sum_rows(matrix + row * w.row_stride + w.begin(tile), w.row_stride, min64(w.block_rows, w.rows - row), slots, own.chain,
               own.total);
      float* part = shared.parts + block * w.stride() + tile * Wide::tile_size;
      for (int64_t i = 0; i < slots.size(); ++i) part[i] = static_cast<float>(own.total[i]);
    }
#pragma omp single nowait
    if (w.group > 1)
      sum_strided(matrix + w.rows * w.group * f.row, f.row, 1, f.M - w.rows * w.group, f.N, shared.tail);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t task = 0; task < w.tiles * tile_slots; ++task) {
      const int64_t tile = task / tile_slots, slot = task % tile_slots;
      const Slots slots = w.slots(tile);
      if (slot >= slots.count()) continue;
      double columns[kSlot];
      join<T>(shared.parts + tile * Wide::tile_size + slot * kSlot, w.blocks, w.stride(), columns);
      const int64_t skip = slot * kSlot - slots.begin(slot), first = w.begin(tile) + slot * kSlot;
      if (w.group == 1)
        write_as(f.out_dtype, f.sums, first, columns + skip, kSlot - skip);
      else
        memcpy(shared.columns + first, columns + skip, (kSlot - skip) * sizeof(double));
    }
  }
  if (w.group == 1) return;
  for (int64_t g = 0; g < w.group; ++g)
    for (int64_t n = 0; n < f.N; ++n) shared.tail[n] += shared.columns[g * f.N + n];
  write_as(f.out_dtype, f.sums, 0, shared.tail, f.N);
}

// Columns whose elements lie side by side, as in a transposed matrix.
template <class T>
void sum_lines(const ColumnSum& f) {
  const T* matrix = static_cast<const T*>(f.matrix);
  const int64_t runs = ceil_div(f.M, kLineRun);
  Workspace space(f.N * runs * sizeof(double));
  double* parts = static_cast<double*>(space.memory);
#pragma omp parallel for schedule(static) num_threads(f.threads)
  for (int64_t task = 0; task < f.N * runs; ++task) {
    const int64_t n = task / runs, m = task % runs * kLineRun;
    parts[task] = sum_line(matrix + n * f.col + m, min64(kLineRun, f.M - m));
  }
  for (int64_t n = 0; n < f.N; ++n) {
    double sum = parts[n * runs];
    for (int64_t run = 1; run < runs; ++run) sum += parts[n * runs + run];
    write_as(f.out_dtype, f.sums, n, &sum, 1);
  }
}

template <class T>
void sum_any(const ColumnSum& f) {
  const T* matrix = static_cast<const T*>(f.matrix);
  const int64_t block_rows = rows_of_a_block(f.M), blocks = ceil_div(f.M, block_rows), tiles = ceil_div(f.N, kStridedCols);
  Workspace space(blocks * f.N * sizeof(double));
  double* parts = static_cast<double*>(space.memory);
#pragma omp parallel for schedule(dynamic) num_threads(f.threads)
  for (int64_t task = 0; task < blocks * tiles; ++task) {
    const int64_t block = task / tiles, m = block * block_rows, n = task % tiles * kStridedCols;
    sum_strided(matrix + m * f.row + n * f.col, f.row, f.col, min64(block_rows, f.M - m), min64(kStridedCols, f.N - n),
                parts + block * f.N + n);
  }
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t n = 0; n < f.N; ++n) parts[n] += parts[b * f.N + n];
  write_as(f.out_dtype, f.sums, 0, parts, f.N);
}

template <class T>
void run(const ColumnSum& f) {
  const Wide wide(f);
  if ((f.col == 1 || f.N == 1) && wide.fits()) return sum_wide<T>(f, wide);
  if (f.row == 1 || f.M == 1) return sum_lines<T>(f);
  sum_any<T>(f);
}

void dispatch(const ColumnSum& f) {
  switch (f.dtype) {
    case Dtype::f32: return run<float>(f);
    case Dtype::bf16: return run<bf16>(f);
    case Dtype::f16: return run<f16>(f);
    case Dtype::f64: return;  // the caller's own
  }
}

}  // namespace

extern const ColumnSumKernels column_sum_table;
const ColumnSumKernels column_sum_table{dispatch};

}  // namespace PK_ISA
}  // namespace peft_kernels
