// The backward of LayerNorm and RMSNorm on a CPU. This file is compiled once per instruction set (PK_ISA).
//
// What bounds it is one read of dy and x and one write of dx. Rows are taken in groups: the sums along each of its rows
// first, which bring it into a cache; then, column by column, dx of all its rows and their terms of dweight and dbias, which
// are added in registers before they meet their chains. Blocks of rows are cut by the shape alone and their sums are added in
// their order: the same bits for every number of threads.
#include "norm_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

constexpr int64_t kGroup = 4;
constexpr int64_t kGroupBytes = 512 << 10;  // of dy and x, which a cache of a core has to hold
constexpr int64_t kJoinCols = 512;

struct Blocks {
  int64_t rows, count;
  explicit Blocks(int64_t M) {
    // A block writes and reads back 16 bytes of sums for each column: 1 % of what 256 rows of 16 bits move. Few rows are cut
    // smaller for the sake of threads, and 128 blocks are enough for those.
    rows = min64(256, ceil_div(M, 32));
    rows = rows < 16 ? 16 : rows;
    rows = rows < ceil_div(M, 128) ? ceil_div(M, 128) : rows;
    count = ceil_div(M, rows);
  }
};

// The sums of a block of rows for every column: chains in fp32 that move to fp64, as column_sum_cpu.h has them.
struct Chain {
  float* chain;
  double* total;
  Chain(Arena& a, int64_t size) : chain(a.take<float>(size)), total(a.take<double>(size)) {}
};

inline void add_to(float* chain, Float v, bool first) { store(chain, first ? v : load(chain) + v); }

template <class T, class D>
struct Group {
  Lines<D> dy;
  Lines<T> x, dtotal;
  T* dx;
  const float *mean, *rstd;
};

// dx of `rows` rows, and their terms of the sums that are needed.
template <int rows, Way way, class T, class D>
inline void group_backward(const NormBwd& f, const Group<T, D>& g, const Chain* dweight, const Chain* dbias, bool first) {
  // Copies of what does not change, as every store might be to where it came from.
  const int64_t K = f.K, next_dy = rows * g.dy.apart, next_x = rows * g.x.apart;
  const bool need_dx = f.dx != nullptr, has_dtotal = g.dtotal.first != nullptr;
  const float* const weights = f.weight;
  float* const dweights = dweight ? dweight->chain : nullptr;
  float* const dbiases = dbias ? dbias->chain : nullptr;
  float mean[rows], rstd[rows], sum[rows] = {}, slope[rows] = {};
  const D* dy[rows];
  const T *x[rows], *dtotal[rows];
  T* dx[rows];
  for (int r = 0; r < rows; ++r) {
    mean[r] = f.rms ? 0 : g.mean[r], rstd[r] = g.rstd[r];
    dy[r] = g.dy[r], x[r] = g.x[r], dtotal[r] = g.dtotal[r], dx[r] = g.dx + (need_dx ? r * K : 0);
    if (!need_dx) continue;
    double sums[2];
    sum_along<2>(K, sums, [&](int64_t k, auto n) {
      const Float grad = get(dy[r] + k, n) * get(weights + k, n);
      return Terms<2>{grad, grad * ((get(x[r] + k, n) - mean[r]) * rstd[r])};
    });
    sum[r] = f.rms ? 0 : static_cast<float>(sums[0] / K);
    slope[r] = static_cast<float>(sums[1] / K);
  }
  along(K, [&](int64_t k, auto n) {
    const Float weight = get(weights + k, n);
    Float grad[rows], product[rows];
    PK_UNROLL
    for (int r = 0; r < rows; ++r) {
      if (need_dx) {  // the next rows: memory would else rest until the sums along them begin
        __builtin_prefetch(x[r] + next_x + k);
        __builtin_prefetch(dy[r] + next_dy + k);
      }
      const Float xhat = (get(x[r] + k, n) - mean[r]) * rstd[r];
      grad[r] = get(dy[r] + k, n);
      product[r] = grad[r] * xhat;
      if (need_dx) {
        // One expression, with or without dtotal: else the compiler chooses per case whether the last step is fused.
        const Float rest = has_dtotal ? get(dtotal[r] + k, n) : Float{};
        set(dx[r] + k, rstd[r] * (grad[r] * weight - sum[r] - xhat * slope[r]) + rest, n, way);
      }
    }
    if constexpr (rows == 4) {
      if (dweights) add_to(dweights + k, (product[0] + product[1]) + (product[2] + product[3]), first);
      if (dbiases) add_to(dbiases + k, (grad[0] + grad[1]) + (grad[2] + grad[3]), first);
    } else {
      static_assert(rows == 1);
      if (dweights) add_to(dweights + k, product[0], first);
      if (dbiases) add_to(dbiases + k, grad[0], first);
    }
  });
}

template <Way way, class T, class D>
class Backward {
  const NormBwd& f_;
  const Blocks blocks_;
  const int64_t size_;  // of a row of sums
  const bool grouped_;
  float *dweight_parts_, *dbias_parts_;

  struct Own {
    D* dy;
    T *x, *dtotal;
    Chain dweight, dbias;
    Own(Arena& a, const NormBwd& f, int64_t size)
        : dy(a.take<D>(copied(f.dy, kGroup, f.K))),
          x(a.take<T>(copied(f.x, kGroup, f.K))),
          dtotal(a.take<T>(copied(f.dtotal, kGroup, f.K))),
          dweight(a, f.dweight ? size : 0),
          dbias(a, f.dbias ? size : 0) {}
  };

  void lay_out(Arena& a) {
    dweight_parts_ = a.take<float>(f_.dweight ? blocks_.count * size_ : 0);
    dbias_parts_ = a.take<float>(f_.dbias ? blocks_.count * size_ : 0);
  }

  void block(int64_t index, const Own& own) const {
    const int64_t K = f_.K, begin = index * blocks_.rows, end = min64(f_.M, begin + blocks_.rows);
    const Chain *dweight = f_.dweight ? &own.dweight : nullptr, *dbias = f_.dbias ? &own.dbias : nullptr;
    int64_t links = 0;
    bool folded = false;
    const auto join = [&] {
      if (dweight) fold(dweight->chain, size_, dweight->total, !folded);
      if (dbias) fold(dbias->chain, size_, dbias->total, !folded);
      folded = true, links = 0;
    };
    for (int64_t m = begin, rows; m < end; m += rows) {
      rows = min64(kGroup, end - m);
      Group<T, D> g;
      g.dy = lines(f_.dy, m, rows, K, own.dy), g.x = lines(f_.x, m, rows, K, own.x);
      g.dtotal = lines(f_.dtotal, m, rows, K, own.dtotal);
      g.dx = static_cast<T*>(f_.dx) + (f_.dx ? m * K : 0);
      g.mean = f_.mean + (f_.rms ? 0 : m), g.rstd = f_.rstd + m;
      if (rows == kGroup && grouped_) {
        group_backward<kGroup, way>(f_, g, dweight, dbias, links == 0);
        if (++links == kChain) join();
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        group_backward<1, way>(f_, g, dweight, dbias, links == 0);
        if (++links == kChain) join();
        g.dy.first += g.dy.apart, g.x.first += g.x.apart, g.dtotal.first += g.dtotal.apart;
        g.dx += f_.dx ? K : 0, ++g.mean, ++g.rstd;
      }
    }
    if (links) join();
    keep(own.dweight, dweight_parts_, index, f_.dweight), keep(own.dbias, dbias_parts_, index, f_.dbias);
  }

  void keep(const Chain& sums, float* parts, int64_t index, const void* wanted) const {
    if (!wanted) return;
    for (int64_t i = 0; i < size_; ++i) parts[index * size_ + i] = static_cast<float>(sums.total[i]);
  }

  void join_blocks(const float* parts, int64_t k, void* out) const {
    if (!out) return;
    double sums[kJoinCols] = {};
    const int64_t live = min64(kJoinCols, f_.K - k);
    for (int64_t b = 0; b < blocks_.count; ++b)
      for (int64_t i = 0; i < live; ++i) sums[i] += parts[b * size_ + k + i];
    write_as(f_.out_dtype, out, k, sums, live);
  }

 public:
  explicit Backward(const NormBwd& f)
      : f_(f),
        blocks_(f.M),
        size_(round_up(f.K, kLanes)),
        grouped_(kGroup * f.K * static_cast<int64_t>(sizeof(T) + sizeof(D)) <= kGroupBytes) {}

  void run() {
    Arena shared_size{nullptr}, own_size{nullptr};
    lay_out(shared_size);
    const Own measured(own_size, f_, size_);
    const int threads = team_for(f_.threads, f_.M, f_.K);
    Workspace space(shared_size.used + threads * own_size.used);
    Arena shared{static_cast<char*>(space.memory)};
    lay_out(shared);
#pragma omp parallel num_threads(threads)
    {
      Arena arena{static_cast<char*>(space.memory) + shared_size.used + thread_id() * own_size.used};
      const Own own(arena, f_, size_);
#pragma omp for schedule(dynamic)
      for (int64_t index = 0; index < blocks_.count; ++index) block(index, own);
      close(way);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < ceil_div(f_.K, kJoinCols); ++task) {
        join_blocks(dweight_parts_, task * kJoinCols, f_.dweight);
        join_blocks(dbias_parts_, task * kJoinCols, f_.dbias);
      }
    }
  }
};

template <class T, class D>
void backward_as(const NormBwd& f) {
  if (f.dx && goes_past_cache(f.dx, f.M, f.K * static_cast<int64_t>(sizeof(T)))) return Backward<Way::past, T, D>(f).run();
  Backward<Way::cached, T, D>(f).run();
}

template <class T>
void backward_of(const NormBwd& f) {
  if (f.dy_dtype == f.dtype) return backward_as<T, T>(f);
  backward_as<T, float>(f);
}

}  // namespace

void norm_backward(const NormBwd& f) {
  switch (f.dtype) {
    case Dtype::f32: return backward_of<float>(f);
    case Dtype::bf16: return backward_of<bf16>(f);
    case Dtype::f16: return backward_of<f16>(f);
    case Dtype::f64: return;  // the caller's own
  }
}

extern const NormKernels norm_table;
const NormKernels norm_table{norm_forward, norm_backward};

}  // namespace PK_ISA
}  // namespace peft_kernels
