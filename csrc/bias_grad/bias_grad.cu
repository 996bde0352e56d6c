// dbias [N] = column sums of dy [M, N] in one or two launches of the same row pass (csrc/common/column_sum.cuh): blocks
// write fp32 sums of their part of the rows, and a small second launch sums the parts. One part needs no second launch.
//
// Floor: the bytes of dy at HBM's bandwidth (67 MB of bf16 at [8192, 4096]: 20 us at 3.35 TB/s). To keep that busy an
// H100 needs 3.35 TB/s * 800 ns / 132 SMs = 20 KB in flight per SM. The pass with 16-byte loads has 3 blocks per SM *
// 256 threads * 8 loads * 16 bytes = 98 KB at the start of every batch; the pass with single elements of 16 bits
// 5 * 256 * 8 * 2 = 20 KB, just enough. The grid is one wave of those blocks, or about four waves where the columns alone are more
// than a quarter of one, so that the last wave's idle part stays small.
#include "bias_grad_cuda.h"

#include "../common/column_sum.cuh"

namespace peft_kernels {

namespace {

constexpr int kBFloat16 = 0, kHalf = 1, kFloat32 = 2;
constexpr int kChain = kBatch;
constexpr int kWideBlocks = 3, kAnyBlocks = 5;  // resident per SM
constexpr int kWarpLanes = 32;
constexpr long long kMostTiles = 1ll << 30;

template <typename Rows>
constexpr int kBlocksPerSm = Rows::kColumns > 1 ? kWideBlocks : kAnyBlocks;

template <int Chain, typename Rows, typename Out>
__global__ void __launch_bounds__(kSumThreads, kBlocksPerSm<Rows>)
    bias_grad_kernel(const Rows rows, Out* const out, const ColumnSum shape) {
  column_sum<Chain>(rows, out, shape);
}

struct Plan {
  bool wide;  // 16-byte loads
  ColumnSum shape;
  long long tiles, parts;
};

long long ceil_div(long long a, long long b) { return a / b + (a % b != 0); }

int itemsize(const BiasGrad& a) { return a.dtype == kFloat32 ? 4 : 2; }

bool has_wide_rows(const BiasGrad& a) {
  const int wide = 16 / itemsize(a);
  return a.column_stride == 1 && a.N % wide == 0 && (a.row_stride % wide == 0 || a.M == 1) &&
         reinterpret_cast<unsigned long long>(a.dy) % 16 == 0;
}

// Threads side by side along rows of `vectors` loads: as many as there are, up to a warp; one where it is the rows that
// lie side by side; more than a warp only where the grid could not hold the tiles otherwise.
int lanes_for(long long vectors, bool rows_are_adjacent) {
  const int most = rows_are_adjacent ? 1 : kWarpLanes;
  int lanes = 1;
  while (lanes < kSumThreads && ((lanes < most && lanes < vectors) || ceil_div(vectors, lanes) > kMostTiles)) lanes *= 2;
  return lanes;
}

Plan plan_for(const BiasGrad& a, int sm_count) {
  Plan plan{};
  plan.wide = has_wide_rows(a);
  const long long vectors = plan.wide ? a.N / (16 / itemsize(a)) : a.N;
  const int lanes = lanes_for(vectors, !plan.wide && a.row_stride < a.column_stride);
  const long long threads_along_rows = kSumThreads / lanes;
  plan.tiles = ceil_div(vectors, lanes);
  const long long slots = static_cast<long long>(sm_count) * (plan.wide ? kWideBlocks : kAnyBlocks);
  const long long enough = plan.tiles * 4 <= slots ? slots / plan.tiles : ceil_div(4 * slots, plan.tiles);
  const long long most = ceil_div(a.M, threads_along_rows * kBatch);  // a full batch for every thread
  const long long fewest = ceil_div(a.M, threads_along_rows * kMostRows);
  const long long wanted = enough < most ? enough : most;
  const long long parts = wanted > fewest ? wanted : fewest;
  const long long rows_per_part = a.M > 0 ? ceil_div(a.M, parts) : 1;
  plan.parts = a.M > 0 ? ceil_div(a.M, rows_per_part) : 1;
  plan.shape = {a.M, a.N, rows_per_part, lanes};
  return plan;
}

template <int Chain, typename Rows, typename Out>
cudaError_t launch_sum(const Rows& rows, void* out, const ColumnSum& shape, long long tiles, long long parts,
                       cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts));
  return launch(bias_grad_kernel<Chain, Rows, Out>, grid, dim3(kSumThreads), 0, stream, rows, static_cast<Out*>(out),
                shape);
}

template <typename T, typename Out>
cudaError_t sum_parts(void* out, const BiasGrad& a, const Plan& plan, cudaStream_t stream) {
  if (plan.wide)
    return launch_sum<kChain, WideRows<T>, Out>({static_cast<const T*>(a.dy), a.row_stride}, out, plan.shape, plan.tiles,
                                                plan.parts, stream);
  return launch_sum<kChain, AnyRows<T>, Out>({static_cast<const T*>(a.dy), a.row_stride, a.column_stride}, out, plan.shape,
                                             plan.tiles, plan.parts, stream);
}

template <typename T, typename Out>
cudaError_t run(const BiasGrad& a, const Plan& plan, cudaStream_t stream) {
  if (plan.parts == 1) return sum_parts<T, Out>(a.dbias, a, plan, stream);
  const cudaError_t error = sum_parts<T, float>(a.workspace, a, plan, stream);
  if (error != cudaSuccess) return error;
  const int lanes = lanes_for(a.N, false);
  const ColumnSum shape{plan.parts, a.N, plan.parts, lanes};
  return launch_sum<1, AnyRows<float>, Out>({a.workspace, a.N, 1}, a.dbias, shape, ceil_div(a.N, lanes), 1, stream);
}

bool valid(const BiasGrad& a, int sm_count) {
  return a.M >= 0 && a.N >= 0 && a.row_stride >= 0 && a.column_stride >= 0 && sm_count > 0 &&
         (a.dtype == kBFloat16 || a.dtype == kHalf || a.dtype == kFloat32);
}

long long workspace_bytes(const BiasGrad& a, const Plan& plan) {
  return plan.parts > 1 ? plan.parts * a.N * static_cast<long long>(sizeof(float)) : 0;
}

cudaError_t bias_grad(const BiasGrad& a, int sm_count, cudaStream_t stream) {
  if (!valid(a, sm_count)) return cudaErrorInvalidValue;
  if (a.N == 0) return cudaSuccess;
  const Plan plan = plan_for(a, sm_count);
  if (plan.tiles > 2 * kMostTiles - 1 || plan.parts > 65535) return cudaErrorInvalidConfiguration;
  if (a.dbias == nullptr || (a.dy == nullptr && a.M > 0)) return cudaErrorInvalidValue;
  if (a.workspace == nullptr && workspace_bytes(a, plan) > 0) return cudaErrorInvalidValue;
  if (a.dtype == kFloat32) return run<float, float>(a, plan, stream);
  if (a.dtype == kBFloat16)
    return a.dbias_fp32 ? run<__nv_bfloat16, float>(a, plan, stream) : run<__nv_bfloat16, __nv_bfloat16>(a, plan, stream);
  return a.dbias_fp32 ? run<__half, float>(a, plan, stream) : run<__half, __half>(a, plan, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

long long bias_grad_workspace(const BiasGrad* args, int sm_count) {
  if (!peft_kernels::valid(*args, sm_count) || args->N == 0) return 0;
  return peft_kernels::workspace_bytes(*args, peft_kernels::plan_for(*args, sm_count));
}

int bias_grad_cuda(const BiasGrad* args, int sm_count, void* stream) {
  return static_cast<int>(peft_kernels::bias_grad(*args, sm_count, static_cast<cudaStream_t>(stream)));
}
}
