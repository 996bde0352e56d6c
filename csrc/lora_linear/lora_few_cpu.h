// The low-rank half for a few rows of x: bound by reading A and B once, so nothing is packed and no team wakes for a small rank.
// Compiled once per instruction set.
//
// Adapters are read in their own dtype, in chunks that are converted into L1; sums over the threads' parts are joined in thread
// order. Long sums are cut in chunks, or in runs of kFewRun terms, before they join a total.
#pragma once

#include "../common/low_rank_cpu.h"
#include "../common/workspace_cpu.h"
#include "lora_linear.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kFewChunk = 1024;         // elements converted at a time
constexpr int64_t kFewRun = 64;             // terms added one after the other
constexpr int64_t kFewPerThread = 1 << 17;  // elements of A and B that repay waking a thread

template <class T>
static inline T dot(const T* p, const T* q, int64_t n) {
  constexpr int W = Vec<T>::lanes;
  T total = 0;
  int64_t i = 0;
  if (n < W) {
    for (; i < n; ++i) total += p[i] * q[i];
    return total;
  }
  typename Vec<T>::type sums[4] = {};
  for (; i + 4 * W <= n; i += 4 * W)
    PK_UNROLL
    for (int j = 0; j < 4; ++j) sums[j] += load(p + i + j * W) * load(q + i + j * W);
  for (; i + W <= n; i += W) sums[0] += load(p + i) * load(q + i);
  const typename Vec<T>::type all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int j = 0; j < W; ++j) total += all[j];
  for (; i < n; ++i) total += p[i] * q[i];
  return total;
}

// to += factor * from
template <class T>
static inline void add_scaled(T* to, T factor, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

template <class Acc, class Store>
static void widen(Acc* to, const Store* from, int64_t n) {
  if constexpr (sizeof(Store) == sizeof(Acc)) {
    convert(to, from, n);
  } else if constexpr (sizeof(Acc) == sizeof(float) && sizeof(Store) < sizeof(float)) {
    convert(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(Store) == 2)
        to[i] = to_float(from[i]);
      else
        to[i] = static_cast<Acc>(from[i]);  // fp64 adapters of fp32 rows are rounded to fp32, as everywhere
    }
  }
}

template <class Acc>
static void read_as(Dtype dtype, const void* from, int64_t at, Acc* to, int64_t n) {
  switch (dtype) {
    case Dtype::f32: return widen(to, static_cast<const float*>(from) + at, n);
    case Dtype::f64: return widen(to, static_cast<const double*>(from) + at, n);
    case Dtype::bf16: return widen(to, static_cast<const bf16*>(from) + at, n);
    case Dtype::f16: return widen(to, static_cast<const f16*>(from) + at, n);
  }
}

// A few rows as [M][n] of the accumulator's type.
template <class K>
static void read_few(const Rows& rows, int64_t M, int64_t n, typename K::Acc* to) {
  for (int64_t m = 0; m < M; ++m) widen(to + m * n, static_cast<const typename K::Store*>(rows.data) + m * rows.row, n);
}

static inline int few_threads(int64_t elements, int most) {
  const int64_t worth = elements / kFewPerThread;
  return worth < 2 ? 1 : static_cast<int>(min64(worth, most));
}

static inline Range part_of(int64_t total, int threads, int id) {
  const int64_t size = ceil_div(total, threads), begin = min64(total, id * size);
  return {begin, min64(total, begin + size)};
}

// Rows [r.begin, r.end) of an adapter [.., cols] in runs that fill a chunk: run(first, count, values).
template <class Acc, class Run>
static void over_rows(Dtype dtype, const void* data, int64_t cols, Range r, Acc* chunk, Run run) {
  const int64_t fit = cols < kFewChunk ? kFewChunk / cols : 1;
  for (int64_t i = r.begin; i < r.end; i += fit) {
    const int64_t count = min64(fit, r.end - i);
    read_as(dtype, data, i * cols, chunk, count * cols);
    run(i, count, chunk);
  }
}

template <class K>
struct FewForward {
  using Acc = typename K::Acc;
  const LoraForward& f;
  int64_t chunk;
  Acc *x, *s, *y, *own;  // [M][K], [M][R], [M][N], one chunk per thread

  FewForward(Arena& arena, const LoraForward& f_, int threads)
      : f(f_),
        chunk(round_up(kFewChunk > f.R ? kFewChunk : f.R, 64)),
        x(arena.take<Acc>(f.M * f.K)),
        s(arena.take<Acc>(f.M * f.R)),
        y(arena.take<Acc>(f.M * f.N)),
        own(arena.take<Acc>(threads * chunk)) {}

  // s[:, r] for a range of r: lora_a is read once.
  void down(Range range, Acc* a) const {
    for (int64_t r = range.begin; r < range.end; ++r) {
      for (int64_t m = 0; m < f.M; ++m) s[m * f.R + r] = 0;
      for (int64_t k = 0; k < f.K; k += kFewChunk) {
        const int64_t n = min64(kFewChunk, f.K - k);
        read_as(f.a_dtype, f.a.data, r * f.K + k, a, n);
        for (int64_t m = 0; m < f.M; ++m) s[m * f.R + r] += dot(a, x + m * f.K + k, n);
      }
    }
  }

  // y[:, n] for a range of n: lora_b is read once.
  void up(Range range, Acc* b_rows) const {
    const auto scale = static_cast<Acc>(f.scaling);
    over_rows(f.b_dtype, f.b.data, f.R, range, b_rows, [&](int64_t n, int64_t count, const Acc* b) {
      for (int64_t m = 0; m < f.M; ++m)
        for (int64_t i = 0; i < count; ++i) {
          const Acc bias = f.bias ? static_cast<const Acc*>(f.bias)[n + i] : Acc(0);
          y[m * f.N + n + i] = dot(b + i * f.R, s + m * f.R, f.R) * scale + bias;
        }
    });
  }
};

template <class K>
static void few_forward(const LoraForward& f) {
  const int threads = few_threads(f.R * (f.K + f.N), f.threads);
  Arena size{nullptr};
  FewForward<K> measured(size, f, threads);
  Workspace space(size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const FewForward<K> few(arena, f, threads);
  read_few<K>(f.x, f.M, f.K, few.x);
#pragma omp parallel num_threads(threads)
  {
    auto* chunk = few.own + thread_id() * few.chunk;
    few.down(part_of(f.R, team_size(), thread_id()), chunk);
#pragma omp barrier
    few.up(part_of(f.N, team_size(), thread_id()), chunk);
  }
  convert(static_cast<typename K::Store*>(f.s), few.s, f.M * f.R);
  convert(static_cast<typename K::Store*>(f.y), few.y, f.M * f.N);
}

template <class K>
struct FewBackward {
  using Acc = typename K::Acc;
  struct Own {
    Acc *chunk, *line;     // rows of an adapter, and of its gradient
    Acc *g_run, *g;        // [M][R] over this thread's columns of dy
    Acc *dx_run, *dx;      // [M][kFewChunk]
  };
  const LoraBackward& f;
  bool need_g;
  Acc *dy, *x, *s, *g;     // [M][N], [M][K], [M][R], [M][R]
  Own* own;

  FewBackward(Arena& arena, const LoraBackward& f_, int threads)
      : f(f_),
        need_g(f.dx || f.da),
        dy(arena.take<Acc>(f.M * f.N)),
        x(arena.take<Acc>(f.da ? f.M * f.K : 0)),
        s(arena.take<Acc>(f.db ? f.M * f.R : 0)),
        g(arena.take<Acc>(f.M * f.R)),
        own(arena.take<Own>(threads)) {
    const int64_t chunk = kFewChunk > f.R ? kFewChunk : f.R, wide = f.M * kFewChunk, rank = f.M * f.R;
    for (int t = 0; t < threads; ++t) {
      const Own one{arena.take<Acc>(chunk), arena.take<Acc>(chunk), arena.take<Acc>(rank),
                    arena.take<Acc>(rank),  arena.take<Acc>(wide),  arena.take<Acc>(wide)};
      if (own) own[t] = one;
    }
  }

  // A range of columns of dy: their part of g, and the rows of dlora_b and dbias that they make.
  void over_n(Range range, Own& o) const {
    const int64_t rank = f.M * f.R;
    for (int64_t i = 0; i < rank; ++i) o.g[i] = o.g_run[i] = 0;
    int64_t run = 0;
    const auto rows = [&](int64_t n, int64_t count, const Acc* b) {
      for (int64_t i = 0; need_g && i < count; ++i) {
        for (int64_t m = 0; m < f.M; ++m) add_scaled(o.g_run + m * f.R, dy[m * f.N + n + i], b + i * f.R, f.R);
        if (++run % kFewRun == 0) join(o.g, o.g_run, rank);
      }
      if (!f.db) return;
      for (int64_t i = 0; i < count; ++i) outer(o.line + i * f.R, dy + n + i, f.N, s, f.R, f.R);
      write_as(f.db_dtype, f.db, n * f.R, o.line, count * f.R);
    };
    if (need_g || f.db) over_rows(f.b_dtype, f.b.data, f.R, range, o.chunk, rows);
    join(o.g, o.g_run, rank);
    for (int64_t n = range.begin; f.dbias && n < range.end; ++n) {
      Acc sum = 0;
      for (int64_t m = 0; m < f.M; ++m) sum += dy[m * f.N + n];
      static_cast<Acc*>(f.dbias)[n] = sum;
    }
  }

  // A range of columns of x: dx, and those of dlora_a.
  void over_k(Range range, Own& o) const {
    for (int64_t k = range.begin; k < range.end; k += kFewChunk) {
      const int64_t n = min64(kFewChunk, range.end - k);
      for (int64_t i = 0; i < f.M * kFewChunk; ++i) o.dx[i] = o.dx_run[i] = 0;
      for (int64_t r = 0; r < f.R; ++r) {
        if (f.dx) {
          read_as(f.a_dtype, f.a.data, r * f.K + k, o.chunk, n);
          for (int64_t m = 0; m < f.M; ++m) add_scaled(o.dx_run + m * kFewChunk, g[m * f.R + r], o.chunk, n);
          if ((r + 1) % kFewRun == 0) join(o.dx, o.dx_run, f.M * kFewChunk);
        }
        if (!f.da) continue;
        outer(o.line, g + r, f.R, x + k, f.K, n);
        write_as(f.da_dtype, f.da, r * f.K + k, o.line, n);
      }
      if (!f.dx) continue;
      join(o.dx, o.dx_run, f.M * kFewChunk);
      for (int64_t i = 0; i < f.M * kFewChunk; ++i) o.dx[i] *= static_cast<Acc>(f.scaling);
      for (int64_t m = 0; m < f.M; ++m)
        convert(static_cast<typename K::Store*>(f.dx) + m * f.K + k, o.dx + m * kFewChunk, n);
    }
  }

 private:
  static void join(Acc* total, Acc* run, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      total[i] += run[i];
      run[i] = 0;
    }
  }

  // line = sum over rows m of scaling * factor[m] * from[m]
  void outer(Acc* line, const Acc* factor, int64_t factor_ld, const Acc* from, int64_t from_ld, int64_t n) const {
    const auto scale = static_cast<Acc>(f.scaling);
    const Acc first = scale * factor[0];
    for (int64_t i = 0; i < n; ++i) line[i] = first * from[i];
    for (int64_t m = 1; m < f.M; ++m) add_scaled(line, scale * factor[m * factor_ld], from + m * from_ld, n);
  }
};

template <class K>
static void few_backward(const LoraBackward& f) {
  const int threads = few_threads(f.R * (f.K + f.N), f.threads);
  Arena size{nullptr};
  FewBackward<K> measured(size, f, threads);
  Workspace space(size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const FewBackward<K> few(arena, f, threads);
  read_few<K>(f.dy, f.M, f.N, few.dy);
  if (f.da) read_few<K>(f.x, f.M, f.K, few.x);
  if (f.db) read_few<K>(f.s, f.M, f.R, few.s);
#pragma omp parallel num_threads(threads)
  {
    const int id = thread_id(), team = team_size();
    few.over_n(part_of(f.N, team, id), few.own[id]);
#pragma omp barrier
    const Range rs = part_of(f.M * f.R, team, id);
    for (int64_t i = rs.begin; i < rs.end; ++i) {
      few.g[i] = few.own[0].g[i];
      for (int t = 1; t < team; ++t) few.g[i] += few.own[t].g[i];
    }
#pragma omp barrier
    if (few.need_g) few.over_k(part_of(f.K, team, id), few.own[id]);
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
