// LayerNorm and RMSNorm backward: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dtotal with g = dy * weight,
// without mean(g) for RMSNorm; dweight = column sums of dy * xhat, dbias of dy.
//
// Floor: dy, x and dtotal read and dx written once (268 MB of bf16 at [8192, 4096], 80 us at 3.35 TB/s; 60 us without
// dtotal). To keep that busy an H100 needs 3.35 TB/s * 800 ns / 132 SMs = 20 KB in flight per SM. One wave of blocks
// goes over the rows, 512 threads per SM: each thread has 64 bytes of the next rows on their way while it reduces
// these, so 32 KB are in flight all the time (18 where a block of 288 threads is all that an SM has; both sums of more
// than 4096 columns of 16 bits leave no registers for that, and ask for 32 KB at the start of each row). The blocks'
// sums are 4 bytes per column, kind and block, which stay in L2: a second launch adds them. Arithmetic: about 40
// instructions per element with both sums, of the 53 that an SM has while 6 bytes of it come and go.
//
// Rows of more than 1024 pieces of 16 bytes (8192 columns of 16 bits) leave a block no registers for chains: dx and the
// sums are then two launches, and dy and x are read twice, 10 bytes where the floor has 6. Without dx the sums need no
// reduction over rows, and tiles of columns and parts of rows lie on the grid freely.
#include "norm_bwd_rows.cuh"

namespace peft_kernels {

namespace {

constexpr int kSumSpan = 32;  // pieces side by side in a tile of the pass without dx
constexpr int kDxPieces = 4;  // per thread where dx alone is made

int sums_needed(const NormBackward& a) { return (a.need_dweight != 0) + (a.need_dbias != 0); }
long long pieces_of(const NormBackward& a) { return a.K / columns_per_piece(a.dtype); }

bool usable(const NormGpu& gpu) { return gpu.sm_count > 0 && gpu.shared_bytes >= 48 << 10; }

// Pieces per thread with which one block holds a row and the sums of its columns; 0: none.
int pieces_per_thread(const NormBackward& a, const NormGpu& gpu) {
  for (int v = 1; v <= kMostCarriedPieces; v *= 2) {
    if (pieces_of(a) > static_cast<long long>(v) * kMostThreads) continue;
    const int columns = columns_per_piece(a.dtype), sums = sums_needed(a);
    const Teams teams = teams_for(pieces_of(a), v, kSumThreads);
    const int fixed = sizeof(WarpSums<4>) + (v == 1 ? sizeof(BlockSums<8>) : 0);
    const int carried = v * columns * sums * teams.threads * static_cast<int>(sizeof(TwoFloat));
    if (fixed + carried <= gpu.shared_bytes) return v;
  }
  return 0;
}

// The launch that makes the columns' sums.
struct SumsPlan {
  Teams teams;
  int held;  // pieces per thread where dx is made with them, else 0
  long long parts, tiles, rows_per_part;
};

SumsPlan plan_sums(const NormBackward& a, const NormGpu& gpu) {
  SumsPlan plan{};
  plan.held = a.need_dx ? pieces_per_thread(a, gpu) : 0;
  plan.teams = plan.held > 0 ? teams_for(pieces_of(a), plan.held, kSumThreads) : Teams{1, kSumThreads};
  while (plan.held == 0 && plan.teams.span < kSumSpan && plan.teams.span < pieces_of(a)) plan.teams.span *= 2;
  plan.tiles = plan.held > 0 ? 1 : ceil_div(pieces_of(a), plan.teams.span);
  const long long blocks_per_sm = kThreadsPerSm / plan.teams.threads;
  const long long wave = ceil_div(blocks_per_sm * gpu.sm_count, plan.tiles);
  const long long most = ceil_div(a.M, 4ll * plan.teams.count());  // four rows for every team
  const long long fewest = ceil_div(a.M, kMostRows * plan.teams.count());
  const long long wanted = wave < most ? wave : most;
  const long long parts = wanted > fewest ? wanted : fewest;
  plan.rows_per_part = parts > 0 ? ceil_div(a.M, parts) : 1;
  plan.parts = a.M > 0 ? ceil_div(a.M, plan.rows_per_part) : 1;
  return plan;
}

long long workspace_bytes(const NormBackward& a, const NormGpu& gpu) {
  if (sums_needed(a) == 0) return 0;
  return plan_sums(a, gpu).parts * sums_needed(a) * a.K * static_cast<long long>(sizeof(float));
}

// ---- the second launch: dweight and dbias of the blocks' sums [count, kinds, K] ----

template <typename Out>
struct Sums {
  Out *first, *second;
  long long K;  // columns of each
};

template <typename Out>
__global__ void __launch_bounds__(kSumThreads, AnyRows<float>::kBlocksPerSm)
    norm_bwd_parts_kernel(const AnyRows<float> rows, const Sums<Out> sums, const ColumnSum shape) {
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes, row = static_cast<int>(threadIdx.x) / shape.lanes;
  const long long column = static_cast<long long>(blockIdx.x) * shape.lanes + lane;
  TwoFloat sum[1] = {};
  if (column < shape.N) sum_rows<1>(rows, row, shape.M, kSumThreads / shape.lanes, column, sum);
  sum_block(sum, shape.lanes);
  if (row > 0 || column >= shape.N) return;
  from_float(sum[0].hi, column < sums.K ? sums.first[column] : sums.second[column - sums.K]);
}

template <typename Out>
cudaError_t add_parts(const NormBackward& a, long long parts, cudaStream_t stream) {
  Out* const dbias = static_cast<Out*>(a.dbias);
  const Sums<Out> sums{a.need_dweight ? static_cast<Out*>(a.dweight) : dbias, dbias, a.K};
  const long long N = sums_needed(a) * a.K;
  const ColumnSum shape{parts, N, parts, lanes_for(N, false)};
  const dim3 grid(static_cast<unsigned>(ceil_div(N, shape.lanes)));
  return launch(norm_bwd_parts_kernel<Out>, grid, dim3(kSumThreads), 0, stream, AnyRows<float>{a.workspace, N, 1}, sums,
                shape);
}

// ---- dx of rows that no block holds: read twice, the second time from L2 ----

template <int W>
__device__ __forceinline__ void load_terms(const NormBackward& a, long long row, long long column, float mean,
                                           float rstd, float (&g)[W], float (&xhat)[W]) {
  float weight[W];
  load_parameter(a.weight, a.weight_dtype, column, 1.0f, weight);
  load_columns<true>(a.dy, a.dy_fp32 ? kFloat32 : a.dtype, row * a.dy_row_stride + column, g);
  load_columns<true>(a.x, a.dtype, row * a.x_row_stride + column, xhat);
#pragma unroll
  for (int c = 0; c < W; ++c) g[c] *= weight[c], xhat[c] = (xhat[c] - mean) * rstd;
}

template <int W>
__global__ void __launch_bounds__(kMostThreads, 2) norm_bwd_looped_kernel(const NormBackward a,
                                                                               const float per_column) {
  const long long row = blockIdx.x, step = static_cast<long long>(blockDim.x) * W;
  const float mean = a.rms ? 0.0f : __ldg(a.mean + row), rstd = __ldg(a.rstd + row);
  TwoFloat of_g = {}, of_both = {};
  float g[W], xhat[W];
  for (long long column = threadIdx.x * W; column < a.K; column += step) {
    load_terms(a, row, column, mean, rstd, g, xhat);
#pragma unroll
    for (int c = 0; c < W; ++c) xhat[c] *= g[c];
    add(of_g, sum_tree(g)), add(of_both, sum_tree(xhat));
  }
  float sums[2] = {of_g.hi, of_both.hi};
  int turn = 0;
  sum_team(sums, static_cast<int>(blockDim.x), turn);
  const float mean_g = a.rms ? 0.0f : sums[0] * per_column, mean_both = sums[1] * per_column;
  for (long long column = threadIdx.x * W; column < a.K; column += step) {
    float dtotal[W] = {};
    load_terms(a, row, column, mean, rstd, g, xhat);
    if (a.dtotal != nullptr) load_columns<true>(a.dtotal, a.dtype, row * a.dtotal_row_stride + column, dtotal);
#pragma unroll
    for (int c = 0; c < W; ++c) g[c] = rstd * (g[c] - mean_g - xhat[c] * mean_both) + dtotal[c];
    store_columns(a.dx, a.dtype, row * a.K + column, g);
  }
}

// ---- launches ----

template <typename P>
cudaError_t launch_rows(const NormBackward& a, const Teams& teams, long long parts, long long tiles,
                        long long rows_per_part, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(tiles));
  const size_t shared_bytes = static_cast<size_t>(P::kSharedPerThread) * teams.threads;
  const RowParts shape{rows_per_part, teams.span, 1.0f / static_cast<float>(a.K)};
  return launch(norm_bwd_rows_kernel<P>, grid, dim3(teams.threads), shared_bytes, stream, a, shape);
}

template <typename T, typename Dy>
cudaError_t run_dx(const NormBackward& a, cudaStream_t stream) {
  using P = Pass<T, Dy, kDxPieces, true, false, false>;
  if (pieces_of(a) > static_cast<long long>(kDxPieces) * P::kThreads)
    return launch(norm_bwd_looped_kernel<P::W>, dim3(static_cast<unsigned>(a.M)), dim3(kMostThreads), 0, stream, a,
                  1.0f / static_cast<float>(a.K));
  const Teams teams = teams_for(pieces_of(a), kDxPieces, 128);
  return launch_rows<P>(a, teams, ceil_div(a.M, teams.count()), 1, teams.count(), stream);
}

template <typename T, typename Dy, int V, bool Dx>
cudaError_t run_sums(const NormBackward& a, const SumsPlan& plan, cudaStream_t stream) {
  const auto go = [&](auto pass) {
    return launch_rows<decltype(pass)>(a, plan.teams, plan.parts, plan.tiles, plan.rows_per_part, stream);
  };
  if (sums_needed(a) == 2) return go(Pass<T, Dy, V, Dx, true, true>{});
  if (a.need_dweight) return go(Pass<T, Dy, V, Dx, true, false>{});
  return go(Pass<T, Dy, V, Dx, false, true>{});
}

template <typename T, typename Dy>
cudaError_t run(const NormBackward& a, const NormGpu& gpu, cudaStream_t stream) {
  if (sums_needed(a) == 0) return a.need_dx && a.M > 0 ? run_dx<T, Dy>(a, stream) : cudaSuccess;
  const SumsPlan plan = plan_sums(a, gpu);
  if (plan.parts > kMostTiles) return cudaErrorInvalidConfiguration;
  if (a.workspace == nullptr) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (plan.held > 0) {
    error = plan.held == 1 ? run_sums<T, Dy, 1, true>(a, plan, stream) : run_sums<T, Dy, 2, true>(a, plan, stream);
  } else {
    if (a.need_dx && a.M > 0) error = run_dx<T, Dy>(a, stream);
    if (error == cudaSuccess) error = run_sums<T, Dy, 1, false>(a, plan, stream);
  }
  if (error != cudaSuccess) return error;
  if (a.sums_fp32) return add_parts<float>(a, plan.parts, stream);
  return add_parts<T>(a, plan.parts, stream);
}

bool takes(const NormBackward& a) {
  if (!known(a.dtype) || a.M < 0 || a.K < 1 || a.K > kMostColumns || a.M > kMostTiles) return false;
  const int columns = columns_per_piece(a.dtype);
  const bool reads_x = a.need_dx || a.need_dweight;
  if (a.K % columns != 0 || !rows_lie_well(a.dy, a.dy_row_stride, a.M, a.dy_fp32 ? 4 : columns)) return false;
  if (reads_x && !rows_lie_well(a.x, a.x_row_stride, a.M, columns)) return false;
  if (!a.need_dx) return true;
  return rows_lie_well(a.dtotal, a.dtotal_row_stride, a.M, columns) && lies_on(a.dx, 16) &&
         parameter_lies_well(a.weight, a.weight_dtype, columns);
}

// Whether what is read and written is there.
bool complete(const NormBackward& a) {
  const bool reads_x = a.need_dx || a.need_dweight;
  if ((a.need_dweight && a.dweight == nullptr) || (a.need_dbias && a.dbias == nullptr)) return false;
  if (a.M == 0) return true;
  if (a.dy == nullptr || (a.need_dx && a.dx == nullptr)) return false;
  return !reads_x || (a.x != nullptr && a.rstd != nullptr && (a.rms || a.mean != nullptr));
}

cudaError_t norm_bwd(const NormBackward& a, const NormGpu& gpu, cudaStream_t stream) {
  if (!takes(a) || !usable(gpu) || !complete(a)) return cudaErrorInvalidValue;
  if (a.dtype == kFloat32) return run<float, float>(a, gpu, stream);
  if (a.dtype == kHalf) return a.dy_fp32 ? run<__half, float>(a, gpu, stream) : run<__half, __half>(a, gpu, stream);
  if (a.dy_fp32) return run<__nv_bfloat16, float>(a, gpu, stream);
  return run<__nv_bfloat16, __nv_bfloat16>(a, gpu, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

int norm_bwd_takes(const NormBackward* args) { return peft_kernels::takes(*args); }

long long norm_bwd_workspace(const NormBackward* args, const NormGpu* gpu) {
  if (!peft_kernels::takes(*args) || !peft_kernels::usable(*gpu)) return 0;
  return peft_kernels::workspace_bytes(*args, *gpu);
}

int norm_bwd_cuda(const NormBackward* args, const NormGpu* gpu, void* stream) {
  return static_cast<int>(peft_kernels::norm_bwd(*args, *gpu, static_cast<cudaStream_t>(stream)));
}
}
