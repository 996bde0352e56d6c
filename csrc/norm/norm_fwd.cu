// LayerNorm and RMSNorm forward: y = (t - mean) * rstd * weight + bias over each row of t = x, or of x + residual,
// which is rounded to x's dtype and written in the same pass.
//
// Floor: x read and y written once, with a residual two matrices each way (134 MB of bf16 at [8192, 4096], 40 us at
// 3.35 TB/s). To keep that busy an H100 needs 3.35 TB/s * 800 ns / 132 SMs = 20 KB in flight per SM. A thread issues
// its 4 or 8 loads of 16 bytes at once and holds them while its team adds them up, twice: the registers leave an SM
// 1024 or 768 threads, so 64 KB or more are asked for by blocks that start together, and while some reduce, others
// load. Rows are read once for all that is done with them. Arithmetic: about 10 instructions per element, of the 35
// that an SM has while 4 bytes of it come and go. Rows of more than 3072 pieces are read again from L2 instead: three
// times for LayerNorm.
//
// Error: a sum over a row is a tree, per piece, over pieces, lanes and warps: at most 3 + 3 + 5 + 4 roundings. Rows
// that are read again add a piece's sum to a TwoFloat. The variance is of centred values.
#include "norm_cuda.h"
#include "norm_rows.cuh"

namespace peft_kernels {

namespace {

// sum over a thread's pieces of a row, each made of `columns` terms by terms(piece, out), 0 for those it lacks.
template <int V, int W, typename Terms>
__device__ __forceinline__ float sum_pieces(const Terms& terms) {
  float sums[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float values[W] = {};
    terms(v, values);
    sums[v] = sum_tree(values);
  }
  return sum_tree(sums);
}

// y's columns `at_column` on of a row, from the values of that row in `values`.
template <int W>
__device__ __forceinline__ void write_normalized(const NormForward& a, long long row, long long column, float mean,
                                                 float rstd, float (&values)[W]) {
  float weight[W], bias[W];
  load_parameter(a.weight, a.weight_dtype, column, 1.0f, weight);
  load_parameter(a.bias, a.bias_dtype, column, 0.0f, bias);
#pragma unroll
  for (int c = 0; c < W; ++c) values[c] = (values[c] - mean) * rstd * weight[c] + bias[c];
  store_columns(a.y, a.y_fp32 ? kFloat32 : a.dtype, row * a.K + column, values);
}

// total = x + residual, kept in `held` and written.
template <typename T, int V, typename Has>
__device__ __forceinline__ void add_residual(const NormForward& a, long long row, int lane, int span, const Has& has,
                                             uint4 (&held)[V]) {
  constexpr int W = kWide<T>, kTogether = 4;
#pragma unroll
  for (int begin = 0; begin < V; begin += kTogether) {
    uint4 other[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (has(begin + i)) other[i] = load_piece<T>(a.residual, row * a.residual_row_stride, (begin + i) * span + lane);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (!has(begin + i)) continue;
      float x[W], r[W];
      unpack<T>(held[begin + i], x);
      unpack<T>(other[i], r);
#pragma unroll
      for (int c = 0; c < W; ++c) x[c] = __fadd_rn(x[c], r[c]);
      held[begin + i] = pack<T>(x);
      const long long first = row * a.K + static_cast<long long>((begin + i) * span + lane) * W;
      store_16(static_cast<T*>(a.total) + first, held[begin + i]);
    }
  }
}

template <int V>
constexpr int kHeldThreads = V == 4 ? 256 : 384;  // at most, in a block

// Rows of up to span * V pieces, held in registers.
template <typename T, int V>
__global__ void __launch_bounds__(kHeldThreads<V>, V == 4 ? 4 : 2)
    norm_fwd_held_kernel(const NormForward a, const float per_column,
                                                                                const int span) {
  constexpr int W = kWide<T>;
  const int lane = static_cast<int>(threadIdx.x) % span, pieces = static_cast<int>(a.K / W);
  const long long row = static_cast<long long>(blockIdx.x) * (blockDim.x / span) + threadIdx.x / span;
  const auto has = [&](int v) { return row < a.M && v * span + lane < pieces; };
  uint4 held[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (has(v)) held[v] = load_piece<T>(a.x, row * a.x_row_stride, v * span + lane);
  if (a.residual != nullptr) add_residual<T>(a, row, lane, span, has, held);

  int turn = 0;
  float mean = 0.0f, sum[1];
  if (!a.rms) {
    sum[0] = sum_pieces<V, W>([&](int v, float(&out)[W]) { unpack<T>(held[v], out); });
    sum_team(sum, span, turn);
    mean = sum[0] * per_column;
  }
  sum[0] = sum_pieces<V, W>([&](int v, float(&out)[W]) {
    if (!has(v)) return;
    unpack<T>(held[v], out);
#pragma unroll
    for (int c = 0; c < W; ++c) out[c] = (out[c] - mean) * (out[c] - mean);
  });
  sum_team(sum, span, turn);
  const float rstd = rsqrtf(sum[0] * per_column + a.eps);
  if (lane == 0 && row < a.M) {
    a.rstd[row] = rstd;
    if (!a.rms) a.mean[row] = mean;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!has(v)) continue;
    float values[W];
    unpack<T>(held[v], values);
    write_normalized(a, row, static_cast<long long>(v * span + lane) * W, mean, rstd, values);
  }
}

// Sum over the block's columns of a row, in pieces of W, of what terms(column, out) makes.
template <int W, typename Terms>
__device__ __forceinline__ float sum_columns_of_row(long long K, int& turn, const Terms& terms) {
  TwoFloat sum = {};
  for (long long column = threadIdx.x * W; column < K; column += static_cast<long long>(blockDim.x) * W) {
    float values[W];
    terms(column, values);
    add(sum, sum_tree(values));
  }
  float all[1] = {sum.hi};
  sum_team(all, static_cast<int>(blockDim.x), turn);
  return all[0];
}

// Rows of any length, a block each. What it normalizes it may have written itself, so it reads that without __ldg.
template <int W>
__global__ void __launch_bounds__(kMostThreads, 2) norm_fwd_looped_kernel(const NormForward a, const float per_column) {
  const long long row = blockIdx.x;
  const bool adds = a.residual != nullptr;
  const long long first = adds ? row * a.K : row * a.x_row_stride;
  const void* source = adds ? a.total : a.x;
  int turn = 0;
  // The first pass adds up what LayerNorm's mean is of, or RMSNorm's squares.
  const float sum = sum_columns_of_row<W>(a.K, turn, [&](long long column, float(&out)[W]) {
    load_columns<true>(a.x, a.dtype, row * a.x_row_stride + column, out);
    if (adds) {
      float other[W];
      load_columns<true>(a.residual, a.dtype, row * a.residual_row_stride + column, other);
#pragma unroll
      for (int c = 0; c < W; ++c) out[c] = rounded(__fadd_rn(out[c], other[c]), a.dtype);
      store_columns(a.total, a.dtype, row * a.K + column, out);
    }
#pragma unroll
    for (int c = 0; c < W; ++c) out[c] *= a.rms ? out[c] : 1.0f;
  });
  const float mean = a.rms ? 0.0f : sum * per_column;
  const float squares = a.rms ? sum : sum_columns_of_row<W>(a.K, turn, [&](long long column, float(&out)[W]) {
    load_columns<false>(source, a.dtype, first + column, out);
#pragma unroll
    for (int c = 0; c < W; ++c) out[c] = (out[c] - mean) * (out[c] - mean);
  });
  const float rstd = rsqrtf(squares * per_column + a.eps);
  if (threadIdx.x == 0) {
    a.rstd[row] = rstd;
    if (!a.rms) a.mean[row] = mean;
  }
  for (long long column = threadIdx.x * W; column < a.K; column += static_cast<long long>(blockDim.x) * W) {
    float values[W];
    load_columns<false>(source, a.dtype, first + column, values);
    write_normalized(a, row, column, mean, rstd, values);
  }
}

template <typename T, int V>
cudaError_t run_held(const NormForward& a, cudaStream_t stream) {
  const Teams teams = teams_for(a.K / kWide<T>, V, 128);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.M, teams.count())));
  return launch(norm_fwd_held_kernel<T, V>, grid, dim3(teams.threads), 0, stream, a, 1.0f / static_cast<float>(a.K),
                teams.span);
}

template <typename T>
cudaError_t run(const NormForward& a, cudaStream_t stream) {
  const long long pieces = a.K / kWide<T>;
  if (pieces <= 4 * kHeldThreads<4>) return run_held<T, 4>(a, stream);
  if (pieces <= 8 * kHeldThreads<8>) return run_held<T, 8>(a, stream);
  const dim3 grid(static_cast<unsigned>(a.M));
  return launch(norm_fwd_looped_kernel<kWide<T>>, grid, dim3(kMostThreads), 0, stream, a,
                1.0f / static_cast<float>(a.K));
}

bool takes(const NormForward& a) {
  if (!known(a.dtype) || a.M < 0 || a.K < 1 || a.K > kMostColumns || a.M > kMostTiles) return false;
  const int columns = columns_per_piece(a.dtype);
  return a.K % columns == 0 && rows_lie_well(a.x, a.x_row_stride, a.M, columns) &&
         rows_lie_well(a.residual, a.residual_row_stride, a.M, columns) && lies_on(a.y, 16) && lies_on(a.total, 16) &&
         parameter_lies_well(a.weight, a.weight_dtype, columns) && parameter_lies_well(a.bias, a.bias_dtype, columns);
}

cudaError_t norm_fwd(const NormForward& a, cudaStream_t stream) {
  if (!takes(a)) return cudaErrorInvalidValue;
  if (a.M == 0) return cudaSuccess;
  if (a.x == nullptr || a.y == nullptr || a.rstd == nullptr) return cudaErrorInvalidValue;
  if ((!a.rms && a.mean == nullptr) || (a.residual != nullptr && a.total == nullptr)) return cudaErrorInvalidValue;
  if (a.dtype == kBFloat16) return run<__nv_bfloat16>(a, stream);
  if (a.dtype == kHalf) return run<__half>(a, stream);
  return run<float>(a, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

int norm_fwd_takes(const NormForward* args) { return peft_kernels::takes(*args); }

int norm_fwd_cuda(const NormForward* args, void* stream) {
  return static_cast<int>(peft_kernels::norm_fwd(*args, static_cast<cudaStream_t>(stream)));
}
}
