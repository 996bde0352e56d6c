// The forward of the 4-bit linear for few rows: which kernel, and how its threads lie on N and K. The kernels, with
// their floors, are in nf4_linear_mma.cuh and nf4_linear_simt.cuh.
#include "nf4_linear_mma.cuh"
#include "nf4_linear_simt.cuh"

namespace peft_kernels {

namespace {

// Rows of x: above them W is dequantised for cuBLAS, whose wgmma beats mma.sync once products outweigh bytes (an H100's
// HBM brings weights for about 64 rows at the rate of mma.sync). Without tensor cores lookups in shared memory decide.
constexpr long long kMostRows = 64, kMostFloatRows = 4, kMostSimtRows = 2;
constexpr int kBlocksPerSm = 2;
constexpr long long kMostBlocksInAChain = 96;
constexpr long long kMostColumns = 1 << 26;  // of W: what lies within 32 rows of it is counted in 32 bits

// More rows: what of the dequantised weight is there at a time, and what its rows or columns are a multiple of.
constexpr long long kChunkBytes = 24 << 20, kChunkLines = 256;

long long most_rows(int dtype) { return dtype == 2 ? kMostFloatRows : kMostRows; }

long long chunk(long long lines, long long length, int element_bytes) {
  const long long chunks = ceil_div(lines * length * element_bytes, kChunkBytes);
  const long long each = ceil_div(lines, chunks * kChunkLines) * kChunkLines;
  return each < lines ? each : lines;
}

bool takes(const Nf4Linear& a) {
  if (a.dtype < 0 || a.dtype > 2 || a.M < 0 || a.N < 1 || a.K < 1 || a.K > kMostColumns) return false;
  if (a.M > most_rows(a.dtype)) return false;
  if (a.bias != nullptr && (a.bias_dtype < 0 || a.bias_dtype > 2)) return false;
  return known_blocksize(a.weight.blocksize) && a.K % a.weight.blocksize == 0 && on_bytes(a.weight.packed, 16);
}

bool runs_simt(const Nf4Linear& a) { return a.M <= kMostSimtRows || a.dtype == 2; }

// Parts of K: enough for two blocks on every SM, but no more bytes of sums written and read than there are of weights;
// and so many that no more than 96 blocks of weights are added one after the other, whose roundings the tests' bounds
// allow.
MmaPlan plan_mma(const Nf4Linear& a, int sm_count) {
  const long long steps = ceil_div(a.K, kStepK), blocks = ceil_div(a.N, kBlockRows);
  const long long least = ceil_div(a.K, kMostBlocksInAChain * (a.weight.blocksize == 32 ? 32 : 64));
  long long splits = kBlocksPerSm * sm_count / blocks;
  const long long most = a.K / (16 * a.M);
  if (splits > most) splits = most;
  if (splits > steps) splits = steps;
  if (splits < least) splits = least;
  const long long k_per_split = ceil_div(steps, splits) * kStepK;
  return {ceil_div(a.K, k_per_split), k_per_split, log2_of(a.weight.blocksize), wide_x(a, 8)};
}

long long workspace_bytes(const Nf4Linear& a, const MmaPlan& plan) {
  return plan.splits > 1 ? plan.splits * a.M * a.N * static_cast<long long>(sizeof(float)) : 0;
}

SimtPlan plan_simt(const Nf4Linear& a, int sm_count) {
  const long long teams = ceil_div(a.N, kSimtRows), steps = ceil_div(a.K, kSimtStepK);
  int ways = 1;
  while (ways < kSimtWarps && 2 * ways <= steps && teams * ways < 2ll * kSimtWarps * sm_count) ways *= 2;
  return {ways, log2_of(a.weight.blocksize), wide_x(a, a.dtype == 2 ? 4 : 8)};
}

template <typename T, int Tiles, int ColumnTiles, int Bytes>
cudaError_t run_mma(const Nf4Linear& a, const MmaPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.N, kBlockRows)), static_cast<unsigned>(plan.splits));
  return launch(nf4_linear_mma_kernel<T, Tiles, ColumnTiles, Bytes>, grid, dim3(32 * kTiles / Tiles),
                dynamic_bytes(ColumnTiles), stream, a, plan, tables_of(a.weight.fp4));
}

template <typename T, int Tiles, int ColumnTiles>
cudaError_t run_mma(const Nf4Linear& a, const MmaPlan& plan, cudaStream_t stream) {
  if (a.weight.blocksize == 32) return run_mma<T, Tiles, ColumnTiles, 4>(a, plan, stream);
  if (a.weight.blocksize == 64) return run_mma<T, Tiles, ColumnTiles, 8>(a, plan, stream);
  return run_mma<T, Tiles, ColumnTiles, 16>(a, plan, stream);
}

template <typename T>
cudaError_t run_mma(const Nf4Linear& a, int sm_count, cudaStream_t stream) {
  const MmaPlan plan = plan_mma(a, sm_count);
  if (ceil_div(a.N, kBlockRows) > 0x7fffffff || plan.splits > 65535) return cudaErrorInvalidConfiguration;
  if (a.workspace == nullptr && workspace_bytes(a, plan) > 0) return cudaErrorInvalidValue;
  const cudaError_t error = a.M <= 8    ? run_mma<T, 1, 1>(a, plan, stream)
                            : a.M <= 16 ? run_mma<T, 1, 2>(a, plan, stream)
                            : a.M <= 32 ? run_mma<T, 2, 4>(a, plan, stream)
                                        : run_mma<T, 2, 8>(a, plan, stream);
  if (error != cudaSuccess || plan.splits == 1) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.M * a.N, 256)));
  return launch(nf4_linear_parts_kernel<T>, grid, dim3(256), 0, stream, a, static_cast<int64_t>(plan.splits));
}

template <typename T, int M>
cudaError_t run_simt(const Nf4Linear& a, int sm_count, cudaStream_t stream) {
  const SimtPlan plan = plan_simt(a, sm_count);
  const long long blocks = ceil_div(a.N, kSimtRows * (kSimtWarps / plan.ways));
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(nf4_linear_simt_kernel<T, M>, dim3(static_cast<unsigned>(blocks)), dim3(kSimtThreads),
                kPairTableBytes + kSimtBytes, stream, a, plan, tables_of(a.weight.fp4));
}

template <typename T>
cudaError_t run(const Nf4Linear& a, int sm_count, cudaStream_t stream) {
  if (a.M == 1) return run_simt<T, 1>(a, sm_count, stream);
  if (a.M == 2) return run_simt<T, 2>(a, sm_count, stream);
  if constexpr (sizeof(T) == 4)
    return run_simt<T, 4>(a, sm_count, stream);
  else
    return run_mma<T>(a, sm_count, stream);
}

cudaError_t nf4_linear(const Nf4Linear& a, int sm_count, cudaStream_t stream) {
  if (!takes(a) || sm_count <= 0) return cudaErrorInvalidValue;
  if (a.M == 0) return cudaSuccess;
  if (!complete(a.weight) || a.x == nullptr || a.y == nullptr) return cudaErrorInvalidValue;
  if (a.dtype == 0) return run<__nv_bfloat16>(a, sm_count, stream);
  if (a.dtype == 1) return run<__half>(a, sm_count, stream);
  return run<float>(a, sm_count, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

long long nf4_linear_most_rows(int dtype) { return peft_kernels::most_rows(dtype); }

// All columns where rows do not begin with a group of 8 elements, as nf4_dequantize_cuda wants them.
long long nf4_linear_chunk(long long N, long long K, int element_bytes, int columns) {
  if (columns != 0 && K % 8 != 0) return K;
  return columns != 0 ? peft_kernels::chunk(K, N, element_bytes) : peft_kernels::chunk(N, K, element_bytes);
}

int nf4_linear_takes(const Nf4Linear* args) { return peft_kernels::takes(*args); }

long long nf4_linear_workspace(const Nf4Linear* args, int sm_count) {
  if (!peft_kernels::takes(*args) || sm_count <= 0 || args->M == 0 || peft_kernels::runs_simt(*args)) return 0;
  return peft_kernels::workspace_bytes(*args, peft_kernels::plan_mma(*args, sm_count));
}

int nf4_linear_cuda(const Nf4Linear* args, int sm_count, void* stream) {
  return static_cast<int>(peft_kernels::nf4_linear(*args, sm_count, static_cast<cudaStream_t>(stream)));
}
}
