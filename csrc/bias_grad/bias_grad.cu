// dbias [N] = column sums of dy [M, N], by the row pass and the two launches that csrc/common/column_sum*.cuh describe.
//
// Floor: the bytes of dy at HBM's bandwidth (67 MB of bf16 at [8192, 4096]: 20 us at 3.35 TB/s). To keep that busy an
// H100 needs 3.35 TB/s * 800 ns / 132 SMs = 20 KB in flight per SM. The pass with 16-byte loads has 3 blocks per SM *
// 256 threads * 8 loads * 16 bytes = 98 KB at the start of every batch; the pass with single elements of 16 bits
// 5 * 256 * 8 * 2 = 20 KB, just enough. Arithmetic is no limit: 3 instructions per element, of the 128 lanes that an SM
// has for the 8 elements of 16 bits that reach it per clock.
#include "bias_grad_cuda.h"

#include "../common/column_sum_launch.cuh"

namespace peft_kernels {

namespace {

constexpr int kBFloat16 = 0, kHalf = 1, kFloat32 = 2;

// Elements per 16-byte load where dy can be read so, else 1.
int columns_per_load(const BiasGrad& a) {
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  const bool aligned = reinterpret_cast<unsigned long long>(a.dy) % 16 == 0;
  return aligned && a.column_stride == 1 && a.N % wide == 0 && (a.row_stride % wide == 0 || a.M == 1) ? wide : 1;
}

ColumnSumPlan plan_for(const BiasGrad& a, int sm_count) {
  const int columns = columns_per_load(a);
  const long long blocks = columns > 1 ? WideRows<float>::kBlocksPerSm : AnyRows<float>::kBlocksPerSm;
  return plan_column_sum(a.M, a.N, columns, blocks * sm_count, columns == 1 && a.row_stride < a.column_stride);
}

template <typename T, typename Out>
cudaError_t run(const BiasGrad& a, const ColumnSumPlan& plan, cudaStream_t stream) {
  const T* dy = static_cast<const T*>(a.dy);
  Out* dbias = static_cast<Out*>(a.dbias);
  if (columns_per_load(a) > 1) return sum_columns(WideRows<T>{dy, a.row_stride}, dbias, a.workspace, plan, stream);
  return sum_columns(AnyRows<T>{dy, a.row_stride, a.column_stride}, dbias, a.workspace, plan, stream);
}

template <typename T>
cudaError_t run_to(const BiasGrad& a, const ColumnSumPlan& plan, cudaStream_t stream) {
  return a.dbias_fp32 ? run<T, float>(a, plan, stream) : run<T, T>(a, plan, stream);
}

bool valid(const BiasGrad& a, int sm_count) {
  return a.M >= 0 && a.N >= 0 && a.row_stride >= 0 && a.column_stride >= 0 && sm_count > 0 &&
         (a.dtype == kBFloat16 || a.dtype == kHalf || a.dtype == kFloat32);
}

cudaError_t bias_grad(const BiasGrad& a, int sm_count, cudaStream_t stream) {
  if (!valid(a, sm_count)) return cudaErrorInvalidValue;
  if (a.N == 0) return cudaSuccess;
  const ColumnSumPlan plan = plan_for(a, sm_count);
  if (!plan.fits_a_grid()) return cudaErrorInvalidConfiguration;
  if (a.dbias == nullptr || (a.dy == nullptr && a.M > 0)) return cudaErrorInvalidValue;
  if (a.workspace == nullptr && plan.workspace_bytes() > 0) return cudaErrorInvalidValue;
  if (a.dtype == kBFloat16) return run_to<__nv_bfloat16>(a, plan, stream);
  if (a.dtype == kHalf) return run_to<__half>(a, plan, stream);
  return run<float, float>(a, plan, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

long long bias_grad_workspace(const BiasGrad* args, int sm_count) {
  if (!peft_kernels::valid(*args, sm_count) || args->N == 0) return 0;
  return peft_kernels::plan_for(*args, sm_count).workspace_bytes();
}

int bias_grad_cuda(const BiasGrad* args, int sm_count, void* stream) {
  return static_cast<int>(peft_kernels::bias_grad(*args, sm_count, static_cast<cudaStream_t>(stream)));
}
}
