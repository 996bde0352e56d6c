// The LoRA linear's low-rank products on a CPU. This file is compiled once per instruction set (PK_ISA).
//
// All six products are C[i, j] (+)= sum_k P[i, k] Q[k, j] with P broadcast and Q in vectors along j:
//   forward, per block of rows   s = drop(x) @ At          y  = scaling * s @ Bt + bias
//   backward, per block of rows  g = dy @ B                dx = scaling * drop(g @ A)
//                                dBt += s.T @ dy           dA += g.T @ drop(x)
// A block of rows is read once, in chunks of columns that are converted into L2. Each thread owns a fixed range of rows and
// its own dA and dBt, which are added in thread order: the result depends on the number of threads, never on timing.
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../common/blocks_cpu.h"
#include "lora_linear.h"

namespace peft_kernels {
namespace PK_ISA {

#if defined(_OPENMP)
static inline int thread_id() { return omp_get_thread_num(); }
static inline int team_size() { return omp_get_num_threads(); }
#else
static inline int thread_id() { return 0; }
static inline int team_size() { return 1; }
#endif

constexpr int64_t kPackRun = 256;      // reduction rows packed per task
constexpr int64_t kLongChain = 2048;   // terms after which a partial sum of s or g joins the total
constexpr int64_t kLongBlocks = 16;    // the same for dA and dB, in blocks of rows

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

// The rows of thread `id`: whole tiles, so that only the last thread meets a tail.
struct RowRange {
  int64_t begin, end;
  RowRange(int64_t M, int threads, int id) {
    const int64_t share = round_up(ceil_div(M, threads), 24);
    begin = min64(M, id * share);
    end = min64(M, begin + share);
  }
};

// Packs all panels of Q [rows, cols], shared among the threads.
template <class K>
static void pack(typename K::Step* dst, int64_t panels, int64_t width, int64_t rows, int64_t cols, const Rows& src,
                 bool transposed, int threads, int id) {
  const auto* data = static_cast<const typename K::Store*>(src.data);
  const int64_t even = round_up(rows, K::pair), runs = ceil_div(even, kPackRun);
  for (int64_t task = id; task < panels * runs; task += threads) {
    const int64_t panel = task / runs, k0 = task % runs * kPackRun;
    pack_panel<K>(dst + panel * (even / K::pair) * width, width, k0, min64(even, k0 + kPackRun), data, src.row, rows,
                  panel * width, cols, transposed);
  }
}

// sum[m, r] over chunks of columns, with partial sums joined every kLongChain terms.
template <class K>
class RankSum {
  using Acc = typename K::Acc;
  RankLanes<K> lanes_;
  Acc *part_, *total_;
  int64_t terms_ = 0;
  bool has_total_ = false;

 public:
  RankSum(Arena& arena, int64_t R)
      : lanes_(R),
        part_(arena.take<Acc>(kBlockRows * lanes_.padded)),
        total_(arena.take<Acc>(kBlockRows * lanes_.padded)) {}

  void reset() {
    terms_ = 0;
    has_total_ = false;
  }

  // Adds chunk [rows, steps] times rows [step0, step0 + steps) of the packed q [panels][all_steps][width].
  void add(const typename K::Step* chunk, int64_t rows, int64_t steps, const typename K::Step* q, int64_t step0,
           int64_t all_steps) {
    constexpr int64_t run = K::chain / K::pair;
    for (int64_t k = 0; k < steps; k += run) {
      const int64_t n = min64(run, steps - k);
      for (int64_t p = 0; p < lanes_.panels; ++p)
        product(rows, n, chunk + k, q + (p * all_steps + step0 + k) * lanes_.width, part_ + p * lanes_.width);
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

// One row of n = `width` or fewer results: out = (base ? out : 0) + (row * scale + bias). Summed before it is rounded.
template <class K>
static inline void finish_row(typename K::Acc* row, typename K::Acc scale, const typename K::Acc* bias, bool base,
                              typename K::Store* out, int64_t n) {
  typename K::Acc before[K::panel];
  if (bias)
    for (int64_t j = 0; j < n; ++j) row[j] = row[j] * scale + bias[j];
  else
    for (int64_t j = 0; j < n; ++j) row[j] *= scale;
  if (base) {
    convert(before, out, n);
    for (int64_t j = 0; j < n; ++j) row[j] += before[j];
  }
  convert(out, row, n);
}

// out[rows, J] (+)= factor * drop(block @ q) + bias, q packed [panels][R steps][panel].
template <class K>
static void expand(const RankBlock<K>& block, int64_t rows, const typename K::Step* q, int64_t J, double factor,
                   const typename K::Acc* bias, const uint8_t* mask, int64_t mask_ld, bool base, typename K::Store* out,
                   typename K::Acc* scratch) {
  constexpr int64_t width = K::panel, height = 6, run = K::chain / K::pair;
  const int64_t steps = block.row_steps(), group = steps <= run ? height : rows;
  const auto scale = static_cast<typename K::Acc>(factor);
  for (int64_t p = 0, j0 = 0; j0 < J; ++p, j0 += width) {
    const int64_t live = min64(width, J - j0);
    for (int64_t m = 0; m < rows; m += group) {
      const int64_t n = min64(group, rows - m);
      for (int64_t k = 0; k < steps; k += run)
        tiles<typename K::Math, height, K::panel_vectors, 0, 1>(n, min64(run, steps - k), block.by_row + m * block.ld + k,
                                                                block.ld, 1, q + (p * steps + k) * width, width, scratch,
                                                                width, k == 0);
      for (int64_t i = 0; i < n; ++i) {
        typename K::Acc* row = scratch + i * width;
        typename K::Store* to = out + (m + i) * J + j0;
        if (mask) apply_mask(row, mask + (m + i) * mask_ld, j0, live);
        if (live == width)  // a constant for the compiler
          finish_row<K>(row, scale, bias ? bias + j0 : nullptr, base, to, width);
        else
          finish_row<K>(row, scale, bias ? bias + j0 : nullptr, base, to, live);
      }
    }
  }
}

// An adapter gradient [panels][height][panel] summed over blocks of rows by one thread.
template <class K>
class OuterSum {
  using Acc = typename K::Acc;
  int64_t height_, size_, blocks_ = 0;
  Acc *part_, *total_ = nullptr;
  bool fresh_ = true, has_total_ = false;

 public:
  OuterSum(Arena& arena, int64_t height, int64_t columns, int64_t rows)
      : height_(height), size_(round_up(columns, K::panel) * height), part_(arena.take<Acc>(size_)) {
    if (ceil_div(rows, kBlockRows) > kLongBlocks) total_ = arena.take<Acc>(size_);
  }

  // Adds block[:, row0 : row0 + height].T @ chunk, whose first column is `col`.
  void add(const typename K::Step* block, int64_t block_ld, int64_t rows, const typename K::Step* chunk, int64_t chunk_ld,
           int64_t col, int64_t cols) {
    const int64_t steps = ceil_div(rows, K::pair), run = kChainRows / K::pair;
    for (int64_t j = 0; j < cols; j += K::panel)
      for (int64_t k = 0; k < steps; k += run)
        tiles<typename K::Math, 4, K::panel_vectors, 1, 0>(
            height_, min64(run, steps - k), block + k * block_ld, 1, block_ld, chunk + k * chunk_ld + j, chunk_ld,
            part_ + (col + j) / K::panel * height_ * K::panel, K::panel, fresh_ && k == 0);
  }

  void end_block() {
    fresh_ = false;
    if (total_ && ++blocks_ % kLongBlocks == 0) join();
  }

  const Acc* finish() {
    if (total_ && (has_total_ || fresh_)) join();
    if (fresh_ && !has_total_ && size_) memset(part_, 0, size_ * sizeof(Acc));
    return has_total_ ? total_ : part_;
  }

 private:
  void join() {
    if (fresh_ && has_total_) return;
    for (int64_t i = 0; i < size_; ++i) total_[i] = (has_total_ ? total_[i] : Acc(0)) + (fresh_ ? Acc(0) : part_[i]);
    has_total_ = fresh_ = true;
  }
};

// Memory of one call: measured by laying out with a null base, then allocated.
struct Workspace {
  void* memory;
  explicit Workspace(int64_t bytes) : memory(aligned_alloc(64, round_up(bytes + 64, 64))) {
    if (!memory) throw std::bad_alloc();
  }
  ~Workspace() { free(memory); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
};

template <class K>
static void forward(const LoraForward& f) {
  using Step = typename K::Step;
  using Store = typename K::Store;
  const RankLanes<K> lanes(f.R);
  const int64_t k_steps = ceil_div(f.K, K::pair), r_steps = ceil_div(f.R, K::pair), wide = ceil_div(f.N, K::panel);
  const int64_t mask_ld = ceil_div(f.K, 8);
  struct Shared {
    Step *at, *bt;
    Shared(Arena& a, int64_t n_at, int64_t n_bt) : at(a.take<Step>(n_at)), bt(a.take<Step>(n_bt)) {}
  };
  struct Own {
    Step* chunk;
    typename K::Acc* scratch;
    RankSum<K> sum;
    RankBlock<K> block;
    Own(Arena& a, int64_t R)
        : chunk(a.take<Step>(kBlockRows * K::chunk_ld)), scratch(a.take<typename K::Acc>(kBlockRows * K::panel)), sum(a, R), block(a, R) {}
  };
  Arena shared_size{nullptr}, own_size{nullptr};
  Shared(shared_size, lanes.padded * k_steps, wide * r_steps * K::panel);
  Own(own_size, f.R);
  Workspace space(shared_size.used + f.threads * own_size.used);
  Arena shared_arena{static_cast<char*>(space.memory)};
  const Shared shared(shared_arena, lanes.padded * k_steps, wide * r_steps * K::panel);

#pragma omp parallel num_threads(f.threads)
  {
    const int id = thread_id(), threads = team_size();
    pack<K>(shared.at, lanes.panels, lanes.width, f.K, f.R, f.a, true, threads, id);
    pack<K>(shared.bt, wide, K::panel, f.R, f.N, f.b, true, threads, id);
    Arena arena{static_cast<char*>(space.memory) + shared_size.used + id * own_size.used};
    Own own(arena, f.R);
    const RowRange range(f.M, threads, id);
#pragma omp barrier
    for (int64_t m = range.begin; m < range.end; m += kBlockRows) {
      const int64_t rows = min64(kBlockRows, range.end - m);
      uint8_t* mask = f.mask ? f.mask + m * mask_ld : nullptr;
      if (mask)
        fill_mask(mask, rows * mask_ld, f.seed, static_cast<uint64_t>(m * mask_ld), static_cast<uint32_t>(f.threshold));
      own.sum.reset();
      for (int64_t k = 0; k < f.K; k += K::chunk_cols) {
        const int64_t cols = min64(K::chunk_cols, f.K - k);
        load_chunk<K>(own.chunk, static_cast<const Store*>(f.x.data) + m * f.x.row + k, f.x.row, rows, cols, mask, mask_ld, k);
        own.sum.add(own.chunk, rows, ceil_div(cols, K::pair), shared.at, k / K::pair, k_steps);
      }
      own.block.round_from(own.sum.finish(rows), own.sum.ld(), rows, static_cast<Store*>(f.s) + m * f.R);
      expand<K>(own.block, rows, shared.bt, f.N, f.scaling, static_cast<const typename K::Acc*>(f.bias), nullptr, 0,
                f.base, static_cast<Store*>(f.y) + m * f.N, own.scratch);
    }
  }
}

// The chunk as the wide operand of an adapter gradient: rows interleaved where a step holds a pair of them.
template <class K>
static const typename K::Step* across_rows(const typename K::Step* chunk, typename K::Step* pairs, int64_t rows, int64_t cols) {
  if constexpr (K::pair == 2) {
    interleave_rows(pairs, K::pairs_ld, reinterpret_cast<const uint16_t*>(chunk), K::chunk_ld * 2, rows,
                    round_up(cols, K::panel));
    return pairs;
  }
  return chunk;
}

template <class Acc>
static void write_as(Dtype dtype, void* out, int64_t at, const Acc* row, int64_t n) {
  if constexpr (sizeof(Acc) == 8) {
    float narrow[256];
    if (dtype == Dtype::f64) return convert(static_cast<double*>(out) + at, row, n);
    for (int64_t j = 0; j < n; j += 256) {
      const int64_t live = min64(256, n - j);
      for (int64_t i = 0; i < live; ++i) narrow[i] = static_cast<float>(row[j + i]);
      write_as(dtype, out, at + j, narrow, live);
    }
  } else {
    switch (dtype) {
      case Dtype::f32: return convert(static_cast<float*>(out) + at, row, n);
      case Dtype::bf16: return convert(static_cast<bf16*>(out) + at, row, n);
      case Dtype::f16: return convert(static_cast<f16*>(out) + at, row, n);
      case Dtype::f64:
        for (int64_t i = 0; i < n; ++i) static_cast<double*>(out)[at + i] = row[i];
    }
  }
}

// Sum of one panel [height][panel] over the threads, in their order.
template <class K>
static void sum_threads(const typename K::Acc* const* parts, int threads, int64_t at, int64_t size, typename K::Acc* out) {
  memcpy(out, parts[0] + at, size * sizeof(*out));
  for (int t = 1; t < threads; ++t)
    for (int64_t i = 0; i < size; ++i) out[i] += parts[t][at + i];
}

template <class K>
struct BackwardOwn {
  using Step = typename K::Step;
  using Acc = typename K::Acc;
  Step *chunk, *pairs;
  Acc* scratch;
  RankSum<K> g_sum;
  RankBlock<K> g, s;
  OuterSum<K> dbt, da;
  BackwardOwn(Arena& a, const LoraBackward& f, int64_t rows)
      : chunk(a.take<Step>(kBlockRows * K::chunk_ld)),
        pairs(a.take<Step>(K::pair == 2 ? kBlockRows / 2 * K::pairs_ld : 0)),
        scratch(a.take<Acc>((kBlockRows > f.R + 1 ? kBlockRows : f.R + 1) * K::panel + f.R)),
        g_sum(a, f.R),
        g(a, f.R),
        s(a, f.R),
        dbt(a, s_height(f), f.N, rows),
        da(a, f.da ? f.R : 0, f.K, rows) {}

  // Rows of [s | 1] that dy is multiplied with, and the first of them.
  static int64_t s_height(const LoraBackward& f) { return (f.db ? f.R : 0) + (f.dbias ? 1 : 0); }
  static int64_t s_first(const LoraBackward& f) { return f.db ? 0 : f.R; }
};

// One thread's rows: dx, and its share of dBt and dA.
template <class K>
static void backward_rows(const LoraBackward& f, const RowRange& range, const typename K::Step* b, const typename K::Step* a,
                          BackwardOwn<K>& own) {
  using Store = typename K::Store;
  const bool need_g = f.dx || f.da;
  const int64_t height = own.s_height(f), n_steps = ceil_div(f.N, K::pair), mask_ld = ceil_div(f.K, 8);
  for (int64_t m = range.begin; m < range.end; m += kBlockRows) {
    const int64_t rows = min64(kBlockRows, range.end - m);
    const uint8_t* mask = f.mask ? f.mask + m * mask_ld : nullptr;
    if (f.db)
      for (int64_t i = 0; i < rows; ++i) own.s.set_row(i, static_cast<const Store*>(f.s.data) + (m + i) * f.s.row);
    if (f.dbias) own.s.set_ones(rows);
    if (height) own.s.close(rows);
    own.g_sum.reset();
    for (int64_t n = 0; n < f.N && (need_g || height); n += K::chunk_cols) {
      const int64_t cols = min64(K::chunk_cols, f.N - n);
      load_chunk<K>(own.chunk, static_cast<const Store*>(f.dy.data) + m * f.dy.row + n, f.dy.row, rows, cols, nullptr, 0, 0);
      if (need_g) own.g_sum.add(own.chunk, rows, ceil_div(cols, K::pair), b, n / K::pair, n_steps);
      if (height)
        own.dbt.add(own.s.by_column + own.s_first(f), own.s.columns_ld, rows,
                    across_rows<K>(own.chunk, own.pairs, rows, cols), K::pair == 2 ? K::pairs_ld : K::chunk_ld, n, cols);
    }
    if (height) own.dbt.end_block();
    if (!need_g) continue;
    own.g.round_from(own.g_sum.finish(rows), own.g_sum.ld(), rows, nullptr);
    if (f.dx)
      expand<K>(own.g, rows, a, f.K, f.scaling, nullptr, mask, mask_ld, f.base, static_cast<Store*>(f.dx) + m * f.K,
                own.scratch);
    for (int64_t k = 0; k < f.K && f.da; k += K::chunk_cols) {
      const int64_t cols = min64(K::chunk_cols, f.K - k);
      load_chunk<K>(own.chunk, static_cast<const Store*>(f.x.data) + m * f.x.row + k, f.x.row, rows, cols, mask, mask_ld, k);
      own.da.add(own.g.by_column, own.g.columns_ld, rows, across_rows<K>(own.chunk, own.pairs, rows, cols),
                 K::pair == 2 ? K::pairs_ld : K::chunk_ld, k, cols);
    }
    if (f.da) own.da.end_block();
  }
}

// Adds the threads' shares, scales and writes; panels are dealt out to the threads.
template <class K>
static void backward_reduce(const LoraBackward& f, const typename K::Acc* const* dbt, const typename K::Acc* const* da,
                            typename K::Acc* scratch, int threads, int id) {
  using Acc = typename K::Acc;
  const Acc scale = static_cast<Acc>(f.scaling);
  const int64_t height = BackwardOwn<K>::s_height(f);
  Acc* line = scratch + (f.R + 1) * K::panel;
  for (int64_t p = id; height && p * K::panel < f.N; p += threads) {
    const int64_t n0 = p * K::panel, live = min64(K::panel, f.N - n0);
    sum_threads<K>(dbt, threads, p * height * K::panel, height * K::panel, scratch);
    if (f.dbias)
      memcpy(static_cast<Acc*>(f.dbias) + n0, scratch + (height - 1) * K::panel, live * sizeof(Acc));
    for (int64_t n = 0; n < live && f.db; ++n) {
      for (int64_t r = 0; r < f.R; ++r) line[r] = scratch[r * K::panel + n] * scale;
      write_as(f.db_dtype, f.db, (n0 + n) * f.R, line, f.R);
    }
  }
  for (int64_t p = id; f.da && p * K::panel < f.K; p += threads) {
    const int64_t k0 = p * K::panel, live = min64(K::panel, f.K - k0);
    sum_threads<K>(da, threads, p * f.R * K::panel, f.R * K::panel, scratch);
    for (int64_t i = 0; i < f.R * K::panel; ++i) scratch[i] *= scale;
    for (int64_t r = 0; r < f.R; ++r) write_as(f.da_dtype, f.da, r * f.K + k0, scratch + r * K::panel, live);
  }
}

template <class K>
static void backward(const LoraBackward& f) {
  using Step = typename K::Step;
  using Acc = typename K::Acc;
  const RankLanes<K> lanes(f.R);
  const bool need_g = f.dx || f.da;
  const int64_t n_steps = ceil_div(f.N, K::pair), r_steps = ceil_div(f.R, K::pair), wide = ceil_div(f.K, K::panel);
  const int64_t b_size = need_g ? lanes.padded * n_steps : 0, a_size = f.dx ? wide * r_steps * K::panel : 0;
  const int64_t share = RowRange(f.M, f.threads, 0).end;
  Arena size{nullptr}, own_size{nullptr};
  size.take<Step>(b_size);
  size.take<Step>(a_size);
  size.take<const Acc*>(2 * f.threads);
  BackwardOwn<K>(own_size, f, share);
  Workspace space(size.used + f.threads * own_size.used);
  Arena arena{static_cast<char*>(space.memory)};
  Step* b = arena.take<Step>(b_size);
  Step* a = arena.take<Step>(a_size);
  const Acc** parts = arena.take<const Acc*>(2 * f.threads);

#pragma omp parallel num_threads(f.threads)
  {
    const int id = thread_id(), threads = team_size();
    if (need_g) pack<K>(b, lanes.panels, lanes.width, f.N, f.R, f.b, false, threads, id);
    if (f.dx) pack<K>(a, wide, K::panel, f.R, f.K, f.a, false, threads, id);
    Arena own_arena{static_cast<char*>(space.memory) + size.used + id * own_size.used};
    const RowRange range(f.M, threads, id);
    BackwardOwn<K> own(own_arena, f, share);
#pragma omp barrier
    backward_rows<K>(f, range, b, a, own);
    parts[id] = own.dbt.finish();
    parts[f.threads + id] = own.da.finish();
#pragma omp barrier
    backward_reduce<K>(f, parts, parts + f.threads, own.scratch, threads, id);
  }
}

#if defined(__AVX512BF16__)
using BF16 = Kind<Dot2, bf16>;
#else
using BF16 = Kind<Fma<float>, bf16>;
#endif

static void dispatch_forward(const LoraForward& f) {
  switch (f.dtype) {
    case Dtype::f32: return forward<Kind<Fma<float>, float>>(f);
    case Dtype::f64: return forward<Kind<Fma<double>, double>>(f);
    case Dtype::bf16: return forward<BF16>(f);
    case Dtype::f16: return forward<Kind<Fma<float>, f16>>(f);
  }
}

static void dispatch_backward(const LoraBackward& f) {
  switch (f.dtype) {
    case Dtype::f32: return backward<Kind<Fma<float>, float>>(f);
    case Dtype::f64: return backward<Kind<Fma<double>, double>>(f);
    case Dtype::bf16: return backward<BF16>(f);
    case Dtype::f16: return backward<Kind<Fma<float>, f16>>(f);
  }
}

extern const LoraKernels lora_linear_kernels;
const LoraKernels lora_linear_kernels{dispatch_forward, dispatch_backward};

}  // namespace PK_ISA
}  // namespace peft_kernels
