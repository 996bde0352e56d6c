// The activation pass on a CPU: dz[m, n] = dy[m, n] * act'(z[m, n]), dbias[n] = the sum over m of that before its rounding;
// and the forward of ReLU with its bits. This file is compiled once per instruction set (PK_ISA).
//
// Rows are cut into blocks by the matrix's shape alone, columns into tiles, threads take these tasks as they are free, and
// the blocks' sums are added in their order: the same bits for every number of threads, with dz or without. Error of a sum:
// a term takes kActStreams rows' tree (2 roundings) and a chain of fp32 sums (kChain - 1), then fp64: 12 at most.
#include "act.h"

#include <cmath>

#include "../common/results_cpu.h"
#include "../common/tasks_cpu.h"
#include "../common/workspace_cpu.h"
#include "act_slots_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

constexpr int64_t kActStreams = 4;  // rows taken at a time: three streams of memory each
constexpr int64_t kTileCols = 4096, kFewestCols = 256;  // a chain of a tile (fp32) stays in L1, its totals (fp64) in L2
constexpr int64_t kRowBlocks = 32, kFewestRows = kActStreams * kChain;
constexpr int64_t kTasks = 16;  // wanted at least, for threads to share

// ---- a pass over rows ----

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

// ---- float64: dz alone, element by element ----

static double derivative(Activation activation, double z) {
  double level, slope;
  if (activation == Activation::gelu) {
    level = 0.5 * erfc(z * -0.70710678118654752440);
    const double density = exp(-0.5 * z * z) * 0.39894228040143267794;
    slope = density > 0 ? z * density : 0;
  } else {
    const bool silu = activation == Activation::silu;
    constexpr double kScale = 1.59576912160573071176, kCube = 0.044715;  // 2 sqrt(2 / pi)
    const double v = silu ? z : kScale * z * (1 + kCube * z * z), e = exp(-fabs(v)), small = e / (1 + e);
    level = v > 0 ? 1 / (1 + e) : small;  // NaN too
    slope = e > 0 ? z * (small / (1 + e)) * (silu ? 1 : kScale * (1 + 3 * kCube * z * z)) : 0;
  }
  return level + slope;
}

void run_bwd_f64(const ActBwd& f) {
  const auto *dy = static_cast<const double*>(f.dy), *z = static_cast<const double*>(f.kept);
  const auto* mask = static_cast<const uint8_t*>(f.kept);
  auto* dz = static_cast<double*>(f.dz);
#pragma omp parallel for schedule(static) num_threads(f.threads)
  for (int64_t m = 0; m < f.M; ++m)
    for (int64_t n = 0; n < f.N; ++n) {
      const double g = dy[m * f.dy_row + n * f.dy_col];
      if (f.activation == Activation::relu)
        dz[m * f.N + n] = mask[m * f.kept_row + n / 8] >> (n % 8) & 1 ? g : 0;
      else
        dz[m * f.N + n] = g * derivative(f.activation, z[m * f.kept_row + n * f.kept_col]);
    }
}

// ---- the forward of ReLU ----

template <int bytes>
struct Signed {
  using type = int32_t;
};
template <>
struct Signed<2> {
  using type = int16_t;
};
template <class T>
constexpr int kInfinity = -(1 << 23);  // the bits of -inf as a signed number
template <>
constexpr int kInfinity<bf16> = -(1 << 7);
template <>
constexpr int kInfinity<f16> = -(1 << 10);

// One bit for each lane of a mask of all ones or zeros.
template <class S>
static inline uint32_t lane_bits(typename Vec<S>::type mask) {
#if defined(__AVX512BW__)
  return sizeof(S) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi16_mask((__m512i)mask);
#elif defined(__AVX2__)
  if (sizeof(S) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  const __m256i bytes = (__m256i)mask;
  return static_cast<uint32_t>(
      _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1))));
#else
  uint32_t bits = 0;
  PK_UNROLL
  for (int i = 0; i < Vec<S>::lanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// One slot: y, and its kSlot / 8 bytes of bits.
template <class T>
static inline void relu_slot(const T* z, T* y, uint8_t* mask, bool uncached) {
  using S = typename Signed<sizeof(T)>::type;
  constexpr int lanes = Vec<S>::lanes;
  uint32_t bits = 0;
  PK_UNROLL
  for (int i = 0; i < kSlot; i += lanes) {
    const typename Vec<S>::type v = load(reinterpret_cast<const S*>(z + i));
    // Signed numbers above -inf's: positive ones, both zeros but -0, NaNs of either sign.
    const typename Vec<S>::type passes = (v > static_cast<S>(kInfinity<T>)) & (v != 0);
    store_line(y + i, (Floats)(v & passes), uncached);
    bits |= lane_bits<S>(passes) << i;
  }
  memcpy(mask, &bits, kSlot / 8);
}

template <class T>
static void relu_part(const T* z, int64_t apart, T* y, uint8_t* mask, int64_t columns, bool uncached) {
  int64_t n = 0;
  if (apart == 1)
    for (; n + kSlot <= columns; n += kSlot) relu_slot(z + n, y + n, mask + n / 8, uncached);
  for (; n < columns; n += kSlot) {
    const int64_t live = min64(kSlot, columns - n);
    T in[kSlot] = {}, out[kSlot];
    uint8_t bits[kSlot / 8];
    gather(in, z + n * apart, apart, live);
    relu_slot(in, out, bits, false);
    memcpy(y + n, out, live * sizeof(T));
    memcpy(mask + n / 8, bits, ceil_div(live, 8));
  }
}

template <class T>
void run_relu(const ReluFwd& f) {
  constexpr int64_t run = 1 << 16;  // elements of a task, about
  const bool unit = f.col == 1 || f.N == 1, whole = unit && f.N % 8 == 0 && (f.row == f.N || f.M == 1);
  const int64_t M = whole ? 1 : f.M, N = whole ? f.M * f.N : f.N, mask_row = ceil_div(N, 8);
  const int64_t rows = N < run ? run / N : 1, blocks = ceil_div(M, rows), parts = ceil_div(N, run);
  const bool uncached = goes_past_cache(f.y, M, N * static_cast<int64_t>(sizeof(T)));
  const T* z = static_cast<const T*>(f.z);
  T* y = static_cast<T*>(f.y);
#pragma omp parallel num_threads(static_cast<int>(min64(f.threads, blocks * parts)))
  {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < blocks * parts; ++task) {
      const int64_t n = task % parts * run, first = task / parts * rows;
      for (int64_t m = first; m < min64(first + rows, M); ++m)
        relu_part(z + m * f.row + n * f.col, unit ? 1 : f.col, y + m * N + n, f.mask + m * mask_row + n / 8,
                  min64(run, N - n), uncached);
    }
    if (uncached) finish_stores();
  }
}

void run_relu_f64(const ReluFwd& f) {
  const double* z = static_cast<const double*>(f.z);
  double* y = static_cast<double*>(f.y);
#pragma omp parallel for schedule(static) num_threads(f.threads)
  for (int64_t m = 0; m < f.M; ++m) {
    uint8_t* mask = f.mask + m * ceil_div(f.N, 8);
    memset(mask, 0, ceil_div(f.N, 8));
    for (int64_t n = 0; n < f.N; ++n) {
      const double v = z[m * f.row + n * f.col];
      const bool passes = !(v <= 0);
      y[m * f.N + n] = passes ? v : 0;
      mask[n / 8] |= static_cast<uint8_t>(passes << (n % 8));
    }
  }
}

// ---- which of them ----

template <class T>
void run_bwd_of(const ActBwd& f) {
  switch (f.activation) {
    case Activation::relu: return run_bwd<T, Relu>(f);
    case Activation::gelu: return run_bwd<T, Gelu>(f);
    case Activation::gelu_tanh: return run_bwd<T, GeluTanh>(f);
    case Activation::silu: return run_bwd<T, Silu>(f);
  }
}

void bwd(const ActBwd& f) {
  switch (f.dtype) {
    case Dtype::f32: return run_bwd_of<float>(f);
    case Dtype::bf16: return run_bwd_of<bf16>(f);
    case Dtype::f16: return run_bwd_of<f16>(f);
    case Dtype::f64: return run_bwd_f64(f);
  }
}

void relu_fwd(const ReluFwd& f) {
  switch (f.dtype) {
    case Dtype::f32: return run_relu<float>(f);
    case Dtype::bf16: return run_relu<bf16>(f);
    case Dtype::f16: return run_relu<f16>(f);
    case Dtype::f64: return run_relu_f64(f);
  }
}

}  // namespace

extern const ActKernels act_table;
const ActKernels act_table{bwd, relu_fwd};

}  // namespace PK_ISA
}  // namespace peft_kernels
