// Host side of the Hopper LoRA GEMM: tensor maps, the choice of the instantiation, the launch.
#include "lora_gemm_sm90.cuh"

#include "lora_gemm_sm90.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

namespace {

using namespace lora_sm90;

constexpr int kGroup = 16;  // 16 x 128 rows by 8 x 256 columns at once on 132 SMs: the least to read per wave
constexpr int kMaxDevices = 64;

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time, so that the library needs no -lcuda.
EncodeTiled encode_tiled() {
  static std::atomic<EncodeTiled> known{nullptr};
  EncodeTiled encode = known.load(std::memory_order_acquire);
  if (encode != nullptr) return encode;
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  encode = reinterpret_cast<EncodeTiled>(symbol);
  known.store(encode, std::memory_order_release);
  return encode;
}

struct Matrix {
  const void* data;
  long long rows, columns, pitch;  // in elements

  bool usable() const {
    return rows > 0 && columns > 0 && columns % 8 == 0 && pitch % 8 == 0 && pitch >= columns &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

// Boxes of 64 columns (128 bytes: the swizzle's row) by box_rows; outside the matrix they read zeros and write nothing.
bool make_map(CUtensorMap* map, const Matrix& matrix, int dtype, int box_rows) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr || !matrix.usable()) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(matrix.pitch) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t strides[] = {1, 1};
  const CUtensorMapDataType type = dtype == 0 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 2, const_cast<void*>(matrix.data), sizes, pitches, box, strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool make_maps(Maps* maps, const LoraGemm& g) {
  const bool nt = g.q_transposed != 0;
  const Matrix p{g.p, g.M, g.K, g.ld_p}, c{g.c, g.M, g.N, g.ld_c};
  const Matrix q = nt ? Matrix{g.q, g.N, g.K, g.ld_q} : Matrix{g.q, g.K, g.N, g.ld_q};
  const Matrix low = g.R == 0 ? p : Matrix{g.low, g.M, g.R, g.ld_low};  // without a rank: see rank_start
  const Matrix t = g.R == 0 ? q : nt ? Matrix{g.t, g.N, g.R, g.ld_t} : Matrix{g.t, g.R, g.N, g.ld_t};
  const int b_rows = nt ? kTileN : kTileK;
  return make_map(&maps->p, p, g.dtype, kTileM) && make_map(&maps->low, low, g.dtype, kTileM) &&
         make_map(&maps->q, q, g.dtype, b_rows) && make_map(&maps->t, t, g.dtype, b_rows) &&
         make_map(&maps->c, c, g.dtype, kPieceRows);
}

int blocks(long long length, int block) { return static_cast<int>((length + block - 1) / block); }

Problem make_problem(const LoraGemm& g) {
  Problem problem{};
  problem.mask = g.mask;
  problem.bias = g.bias;
  problem.alpha = g.alpha;
  problem.M = static_cast<int>(g.M);
  problem.N = static_cast<int>(g.N);
  problem.k_blocks = blocks(g.K, kTileK);
  problem.rank_blocks = std::max(1, blocks(g.R, kTileK));
  problem.rank = static_cast<int>(std::max(1ll, g.R));
  problem.rank_start = g.R == 0 ? problem.k_blocks * kTileK : 0;
  problem.mask_pitch = blocks(g.N, 8);
  problem.mask_aligned = problem.mask_pitch % 16 == 0 && reinterpret_cast<uintptr_t>(g.mask) % 16 == 0;
  problem.bias_fp32 = g.bias_fp32 != 0;
  problem.group = kGroup;
  return problem;
}

template <typename T, bool Q_TRANSPOSED, bool HAS_MASK>
cudaError_t launch(const Maps& maps, const Problem& problem, int device, int sms, cudaStream_t stream) {
  const auto kernel = lora_gemm_kernel<T, Q_TRANSPOSED, HAS_MASK>;
  static std::atomic<bool> ready[kMaxDevices];  // racing threads set the attribute twice, which does no harm
  if (!ready[device].load(std::memory_order_acquire)) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    ready[device].store(true, std::memory_order_release);
  }
  const long long tiles = static_cast<long long>(blocks(problem.M, kTileM)) * blocks(problem.N, kTileN);
  kernel<<<static_cast<unsigned>(std::min<long long>(tiles, sms)), kThreads, kSharedBytes, stream>>>(maps, problem);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_layout(const LoraGemm& g, const Maps& maps, const Problem& problem, int device, int sms,
                          cudaStream_t stream) {
  const bool masked = g.mask != nullptr && g.R > 0;  // there is nothing to drop without a rank
  if (g.q_transposed != 0) {
    return masked ? launch<T, true, true>(maps, problem, device, sms, stream)
                  : launch<T, true, false>(maps, problem, device, sms, stream);
  }
  return masked ? launch<T, false, true>(maps, problem, device, sms, stream)
                : launch<T, false, false>(maps, problem, device, sms, stream);
}

bool sensible(const LoraGemm& g) {
  constexpr long long kMost = 1ll << 30;  // coordinates are 32-bit
  const bool sizes = g.K > 0 && g.R >= 0 && std::max({g.M, g.N, g.K, g.R}) <= kMost;
  const bool tiles = ((g.M + 127) / 128 + 1) * ((g.N + 255) / 256) < kMost;
  return sizes && tiles && g.dtype >= 0 && g.dtype <= 1 && reinterpret_cast<uintptr_t>(g.bias) % 8 == 0;  // loaded in pairs
}

}  // namespace

extern "C" int lora_gemm_sm90(const LoraGemm* args, void* stream) {
  const LoraGemm& g = *args;
  if (g.M == 0 || g.N == 0) return cudaSuccess;
  Maps maps;
  if (!sensible(g) || !make_maps(&maps, g)) return cudaErrorInvalidValue;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  const Problem problem = make_problem(g);
  const auto queue = static_cast<cudaStream_t>(stream);
  return g.dtype == 0 ? launch_layout<__nv_bfloat16>(g, maps, problem, device, sms, queue)
                      : launch_layout<__half>(g, maps, problem, device, sms, queue);
}
