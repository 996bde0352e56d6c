// The LoRA linear on a CPU. This file is compiled once per instruction set (PK_ISA).
//
// All six products are C[i, j] (+)= sum_k P[i, k] Q[k, j] with P broadcast and Q in vectors along j:
//   forward, per block of rows   s = drop(x) @ At          y  = scaling * s @ Bt + bias
//   backward, per block of rows  g = dy @ B                dx = scaling * drop(g @ A)
//                                dBt += s.T @ dy           dA += g.T @ drop(x)
// A block of rows is read once, in chunks of columns that are converted into L2. Each thread owns a fixed range of rows, or of
// columns, and what they sum to is added in thread order: the result depends on the number of threads, never on timing.
// Given the weight, y and dx are made by a GEMM that starts with the low-rank product (lora_base_cpu.h), after s and g. A few
// rows have their own way (lora_few_cpu.h).
#include "../common/outer_sum_cpu.h"
#include "../common/workspace_cpu.h"
#include "lora_base_cpu.h"
#include "lora_few_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

template <class K>
static void forward(const LoraForward& f) {
  if (few_rows(f.M, f.mask)) return few_forward<K>(f);
  using Step = typename K::Step;
  using Store = typename K::Store;
  const RankLanes<K> lanes(f.R);
  const int64_t mask_ld = ceil_div(f.K, 8);
  const bool whole = f.weight.data, blocks = f.M > kBlockRows;
  LoraBase<K> base(f.x, f.K, f.s, f.R, {f.weight.data, f.weight.line, !f.weight.transposed}, f.M, f.N, f.scaling);
  base.bias = static_cast<const typename K::Acc*>(f.bias);
  base.out = static_cast<Store*>(f.y);
  struct Shared {
    Panels<K> at, bt;
    const void** parts;
    GemmShared<K> gemm;
  };
  struct Own {
    Step *chunk, *packed;
    typename K::Acc* scratch;
    RankSum<K> sum;
    RankBlock<K> block;
    typename LoraBase<K>::Own base;
    Own(Arena& a, const Shared& shared, int64_t R, const LoraBase<K>& base_)
        : chunk(a.take<Step>(kBlockRows * K::chunk_ld)),
          packed(a.take<Step>(shared.bt.buffer(shared.bt.steps()))),
          scratch(a.take<typename K::Acc>(kBlockRows * K::panel)),
          sum(a, R, shared.at),
          block(a, R),
          base(a, base_) {}
  };
  const auto lay_out = [&](Arena& arena) {
    return Shared{
        Panels<K>(arena, blocks, {f.a.data, f.a.row, true}, f.K, f.R, lanes.panels, lanes.width),
        Panels<K>(arena, blocks || whole, {f.b.data, f.b.row, true}, f.R, f.N, ceil_div(f.N, K::panel), K::panel),
        arena.take<const void*>(f.threads), GemmShared<K>(arena, whole ? ceil_div(f.K, K::pair) : 0, whole ? f.N : 0, f.threads)};
  };
  Arena shared_size{nullptr}, own_size{nullptr};
  Own(own_size, lay_out(shared_size), f.R, base);
  Workspace space(shared_size.used + f.threads * own_size.used);
  Arena shared_arena{static_cast<char*>(space.memory)};
  const Shared shared = lay_out(shared_arena);

#pragma omp parallel num_threads(f.threads)
  {
    const Split split(f.M, team_size(), thread_id());
    shared.at.prepare(split.threads, split.id);
    shared.bt.prepare(split.threads, split.id);
    Arena arena{static_cast<char*>(space.memory) + shared_size.used + split.id * own_size.used};
    Own own(arena, shared, f.R, base);
    const Range range = split.rows(), ks = split.cols(f.K), ns = split.cols(f.N);
#pragma omp barrier
    for (int64_t m = range.begin; m < range.end; m += kBlockRows) {
      const int64_t rows = min64(kBlockRows, range.end - m);
      uint8_t* mask = f.mask ? f.mask + m * mask_ld : nullptr;
      if (mask) {
        const int64_t first = ks.begin / 8, bytes = ks.begin < ks.end ? ceil_div(ks.end, 8) - first : 0;
        for (int64_t i = 0; i < rows; ++i)
          fill_mask(mask + i * mask_ld + first, bytes, f.seed, static_cast<uint64_t>((m + i) * mask_ld + first),
                    static_cast<uint32_t>(f.threshold));
      }
      own.sum.reset();
      for (int64_t k = ks.begin; k < ks.end; k += K::chunk_cols) {
        const int64_t cols = min64(K::chunk_cols, ks.end - k);
        load_chunk<K>(own.chunk, static_cast<const Store*>(f.x.data) + m * f.x.row + k, f.x.row, rows, cols, mask, mask_ld, k);
        own.sum.add(own.chunk, rows, ceil_div(cols, K::pair), k / K::pair);
      }
      const bool writes_s = !split.columns || split.id == 0;
      own.block.round_from(own.sum.finish(rows, split, shared.parts), own.sum.ld(), rows,
                           writes_s ? static_cast<Store*>(f.s) + m * f.R : nullptr);
      if (!whole)
        expand<K>(own.block, rows, shared.bt, ns, f.scaling, base.bias, nullptr, 0, base.out + m * f.N, own.scratch, own.packed);
    }
#pragma omp barrier
    if (whole) base.run(shared.gemm, own.base, shared.bt.packed);
  }
}

// [at, at + size) of the threads' sums, added in their order and scaled.
template <class Acc>
static void sum_threads(const void* const* parts, int owners, int64_t at, int64_t size, Acc scale, Acc* out) {
  const Acc* part = static_cast<const Acc*>(parts[0]) + at;
  if (owners < 2) {
    for (int64_t i = 0; i < size; ++i) out[i] = owners ? part[i] * scale : Acc(0);
    return;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = part[i];
  for (int t = 1; t < owners; ++t) {
    part = static_cast<const Acc*>(parts[t]) + at;
    for (int64_t i = 0; i < size; ++i) out[i] += part[i];
  }
  for (int64_t i = 0; i < size; ++i) out[i] *= scale;
}

template <class K>
struct BackwardShared {
  Panels<K> b, a;                                 // lora_b and lora_a
  const void **g_parts, **dbt_parts, **da_parts;  // one pointer per thread
  typename K::Store* g;                           // dy @ lora_b [M, R], where dx is made by a whole GEMM, else null
  GemmShared<K> gemm;

  static bool whole(const LoraBackward& f) { return f.dx && f.weight.data; }
  static bool blocks(const LoraBackward& f) { return f.M > kBlockRows; }
  BackwardShared(Arena& arena, const LoraBackward& f, const RankLanes<K>& lanes)
      : b(arena, blocks(f) && (f.dx || f.da), {f.b.data, f.b.row, false}, f.N, f.R, lanes.panels, lanes.width),
        a(arena, f.dx && (blocks(f) || whole(f)), {f.a.data, f.a.row, false}, f.R, f.K, ceil_div(f.K, K::panel), K::panel),
        g_parts(arena.take<const void*>(f.threads)),
        dbt_parts(arena.take<const void*>(f.threads)),
        da_parts(arena.take<const void*>(f.threads)),
        g(whole(f) ? arena.take<typename K::Store>(f.M * f.R) : nullptr),
        gemm(arena, whole(f) ? ceil_div(f.N, K::pair) : 0, whole(f) ? f.K : 0, f.threads) {}
};

template <class K>
struct BackwardOwn {
  using Step = typename K::Step;
  using Acc = typename K::Acc;
  Step *chunk, *pairs, *packed;
  Acc *scratch, *lines;
  RankSum<K> g_sum;
  RankBlock<K> g, s;
  OuterSum<K> dbt, da;
  typename LoraBase<K>::Own base;
  BackwardOwn(Arena& a, const BackwardShared<K>& shared, const LoraBackward& f, const Split& split, const LoraBase<K>& base_)
      : chunk(a.take<Step>(kBlockRows * K::chunk_ld)),
        pairs(a.take<Step>(K::pair == 2 ? kBlockRows / 2 * K::pairs_ld : 0)),
        packed(a.take<Step>(shared.a.buffer(shared.a.steps()))),
        scratch(a.take<Acc>(round_up(f.R > kBlockRows ? f.R : kBlockRows, K::W) * K::panel)),
        lines(a.take<Acc>(round_up(f.R, K::W) * K::W)),
        g_sum(a, f.R, shared.b),
        g(a, f.R),
        s(a, f.R),
        dbt(a, s_height(f), f.N, split.cols(f.N), f.M),
        da(a, f.da ? f.R : 0, f.K, split.cols(f.K), f.M),
        base(a, base_) {}

  // Rows of [s | 1] that dy is multiplied with, and the first of them.
  static int64_t s_height(const LoraBackward& f) { return (f.db ? f.R : 0) + (f.dbias ? 1 : 0); }
  static int64_t s_first(const LoraBackward& f) { return f.db ? 0 : f.R; }
};

// dlora_b [N, R] rows n0 .. n0 + live from a panel [R][panel] of its transpose.
template <class K>
static void write_db(const LoraBackward& f, typename K::Acc* panel, typename K::Acc* lines, int64_t n0, int64_t live) {
  using Bits = typename BitsOf<sizeof(typename K::Acc)>::type;
  const int64_t padded = round_up(f.R, K::W);
  for (int64_t n = 0; n < live; n += K::W) {
    for (int64_t r = 0; r < padded; r += K::W)
      transpose_block(reinterpret_cast<const Bits*>(panel + r * K::panel + n), K::panel, reinterpret_cast<Bits*>(lines + r),
                      padded, K::W);
    for (int64_t i = 0; i < min64(K::W, live - n); ++i) write_as(f.db_dtype, f.db, (n0 + n + i) * f.R, lines + i * padded, f.R);
  }
}

// Where an adapter gradient's sums are: `owners` threads hold them, the first column is `origin`.
struct Parts {
  const void* const* data;
  int owners;
  int64_t origin;
};

// Writes dlora_b and dbias for every `stride`-th panel of columns in `range`.
template <class K>
static void write_over_n(const LoraBackward& f, const Parts& parts, Range range, int64_t stride, BackwardOwn<K>& own) {
  using Acc = typename K::Acc;
  const int64_t height = own.s_height(f);
  for (int64_t n = range.begin; height && n < range.end; n += stride * K::panel) {
    const int64_t live = min64(K::panel, range.end - n), at = (n - parts.origin) * height;
    if (f.dbias) {
      sum_threads<Acc>(parts.data, parts.owners, at + (height - 1) * K::panel, K::panel, 1, own.scratch);
      memcpy(static_cast<Acc*>(f.dbias) + n, own.scratch, live * sizeof(Acc));
    }
    if (!f.db) continue;
    sum_threads<Acc>(parts.data, parts.owners, at, f.R * K::panel, static_cast<Acc>(f.scaling), own.scratch);
    write_db<K>(f, own.scratch, own.lines, n, live);
  }
}

// The same for dlora_a.
template <class K>
static void write_over_k(const LoraBackward& f, const Parts& parts, Range range, int64_t stride, BackwardOwn<K>& own) {
  using Acc = typename K::Acc;
  for (int64_t k = range.begin; f.da && k < range.end; k += stride * K::panel) {
    const int64_t live = min64(K::panel, range.end - k);
    sum_threads<Acc>(parts.data, parts.owners, (k - parts.origin) * f.R, f.R * K::panel, static_cast<Acc>(f.scaling),
                     own.scratch);
    for (int64_t r = 0; r < f.R; ++r) write_as(f.da_dtype, f.da, r * f.K + k, own.scratch + r * K::panel, live);
  }
}

// One thread's rows: dx, or g for the GEMM that makes it, and the thread's share of dBt and dA.
template <class K>
static void backward_rows(const LoraBackward& f, const Split& split, const BackwardShared<K>& shared, BackwardOwn<K>& own) {
  using Store = typename K::Store;
  const bool need_g = f.dx || f.da;
  const int64_t height = own.s_height(f), mask_ld = ceil_div(f.K, 8);
  const Range range = split.rows(), ns = split.cols(f.N), ks = split.cols(f.K);
  for (int64_t m = range.begin; m < range.end; m += kBlockRows) {
    const int64_t rows = min64(kBlockRows, range.end - m);
    const uint8_t* mask = f.mask ? f.mask + m * mask_ld : nullptr;
    if (f.db)
      for (int64_t i = 0; i < rows; ++i) own.s.set_row(i, static_cast<const Store*>(f.s.data) + (m + i) * f.s.row);
    if (f.dbias) own.s.set_ones(rows);
    if (height) own.s.close(rows);
    own.g_sum.reset();
    for (int64_t n = ns.begin; n < ns.end && (need_g || height); n += K::chunk_cols) {
      const int64_t cols = min64(K::chunk_cols, ns.end - n);
      load_chunk<K>(own.chunk, static_cast<const Store*>(f.dy.data) + m * f.dy.row + n, f.dy.row, rows, cols, nullptr, 0, 0);
      if (need_g) own.g_sum.add(own.chunk, rows, ceil_div(cols, K::pair), n / K::pair);
      if (!height) continue;
      own.dbt.add(own.s.by_column + own.s_first(f), own.s.columns_ld, rows, across_rows<K>(own.chunk, own.pairs, rows, cols), n,
                  cols, [&](int64_t at, int64_t live, const void* sums) {
                    write_over_n<K>(f, {&sums, 1, at}, {at, at + live}, 1, own);
                  });
    }
    if (height) own.dbt.end_block();
    if (!need_g) continue;
    const bool writes_g = shared.g && (!split.columns || split.id == 0);
    own.g.round_from(own.g_sum.finish(rows, split, shared.g_parts), own.g_sum.ld(), rows,
                     writes_g ? shared.g + m * f.R : nullptr);
    if (f.dx && !shared.g)
      expand<K>(own.g, rows, shared.a, ks, f.scaling, nullptr, mask, mask_ld, static_cast<Store*>(f.dx) + m * f.K, own.scratch,
                own.packed);
    for (int64_t k = ks.begin; k < ks.end && f.da; k += K::chunk_cols) {
      const int64_t cols = min64(K::chunk_cols, ks.end - k);
      load_chunk<K>(own.chunk, static_cast<const Store*>(f.x.data) + m * f.x.row + k, f.x.row, rows, cols, mask, mask_ld, k);
      own.da.add(own.g.by_column, own.g.columns_ld, rows, across_rows<K>(own.chunk, own.pairs, rows, cols), k, cols,
                 [&](int64_t at, int64_t live, const void* sums) {
                   write_over_k<K>(f, {&sums, 1, at}, {at, at + live}, 1, own);
                 });
    }
    if (f.da) own.da.end_block();
  }
}

template <class K>
static void backward(const LoraBackward& f) {
  if (few_rows(f.M, f.mask)) return few_backward<K>(f);
  const RankLanes<K> lanes(f.R);
  Arena shared_size{nullptr}, own_size{nullptr};
  const BackwardShared<K> measured(shared_size, f, lanes);
  LoraBase<K> base(f.dy, f.N, nullptr, f.R, {f.weight.data, f.weight.line, f.weight.transposed}, f.M, f.K, f.scaling);
  BackwardOwn<K>(own_size, measured, f, Split(f.M, 1, 0), base);
  Workspace space(shared_size.used + f.threads * own_size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const BackwardShared<K> shared(arena, f, lanes);
  base.rank.data = shared.g;
  base.mask = f.mask, base.mask_ld = ceil_div(f.K, 8);
  base.out = static_cast<typename K::Store*>(f.dx);

#pragma omp parallel num_threads(f.threads)
  {
    const Split split(f.M, team_size(), thread_id());
    shared.b.prepare(split.threads, split.id);
    shared.a.prepare(split.threads, split.id);
    Arena own_arena{static_cast<char*>(space.memory) + shared_size.used + split.id * own_size.used};
    BackwardOwn<K> own(own_arena, shared, f, split, base);
#pragma omp barrier
    backward_rows<K>(f, split, shared, own);
    if (f.M == 0 || f.M > kBlockRows) {
      shared.dbt_parts[split.id] = own.dbt.finish();
      shared.da_parts[split.id] = own.da.finish();
#pragma omp barrier
      const int64_t first = split.id * K::panel;
      write_over_n<K>(f, {shared.dbt_parts, split.owners(), 0}, {first, f.N}, split.threads, own);
      write_over_k<K>(f, {shared.da_parts, split.owners(), 0}, {first, f.K}, split.threads, own);
    }
#pragma omp barrier
    if (shared.g) base.run(shared.gemm, own.base, shared.a.packed);
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
