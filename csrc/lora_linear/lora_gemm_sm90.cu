// Host side of the Hopper LoRA GEMM: tensor maps, the choice of the instantiation, the launch.
#include "lora_gemm_sm90.cuh"

#include "../common/sm90_host.h"
#include "lora_gemm_sm90.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace {

using namespace lora_sm90;

constexpr int kGroup = 16;  // 16 x 128 rows by 8 x 256 columns at once on 132 SMs: the least to read per wave

bool make_maps(Maps* maps, const LoraGemm& g) {
  const bool nt = g.q_transposed != 0;
  const auto matrix = [&](const void* data, long long rows, long long columns, long long pitch) {
    return Matrix{data, rows, columns, pitch, g.dtype};
  };
  const Matrix p = matrix(g.p, g.M, g.K, g.ld_p), c = matrix(g.c, g.M, g.N, g.ld_c);
  const Matrix q = nt ? matrix(g.q, g.N, g.K, g.ld_q) : matrix(g.q, g.K, g.N, g.ld_q);
  const Matrix low = g.R == 0 ? p : matrix(g.low, g.M, g.R, g.ld_low);  // without a rank: see rank_start
  const Matrix t = g.R == 0 ? q : nt ? matrix(g.t, g.N, g.R, g.ld_t) : matrix(g.t, g.R, g.N, g.ld_t);
  constexpr int kColumns = kRowBytes / 2;  // of every box: the swizzle's row
  const int b_rows = nt ? kTileN : kTileK;
  return make_map(&maps->p, p, kColumns, kTileM) && make_map(&maps->low, low, kColumns, kTileM) &&
         make_map(&maps->q, q, kColumns, b_rows) && make_map(&maps->t, t, kColumns, b_rows) &&
         make_map(&maps->c, c, kColumns, kPieceRows);
}

Problem make_problem(const LoraGemm& g) {
  Problem problem{};
  problem.mask = g.mask;
  problem.bias = g.bias;
  problem.alpha = g.alpha;
  problem.M = static_cast<int>(g.M);
  problem.N = static_cast<int>(g.N);
  problem.k_blocks = static_cast<int>(blocks(g.K, kTileK));
  problem.rank_blocks = static_cast<int>(std::max(1ll, blocks(g.R, kTileK)));
  problem.rank = static_cast<int>(std::max(1ll, g.R));
  problem.rank_start = g.R == 0 ? problem.k_blocks * kTileK : 0;
  problem.mask_pitch = static_cast<int>(blocks(g.N, 8));
  problem.mask_aligned = problem.mask_pitch % 16 == 0 && aligned(g.mask, 16);
  problem.bias_fp32 = g.bias_fp32 != 0;
  problem.group = kGroup;
  return problem;
}

template <typename T, bool Q_TRANSPOSED, bool HAS_MASK>
cudaError_t launch(const Maps& maps, const Problem& problem, int sms, cudaStream_t stream) {
  const auto kernel = lora_gemm_kernel<T, Q_TRANSPOSED, HAS_MASK>;
  static SharedAllowed allowed;
  const cudaError_t error = allow_shared(kernel, kSharedBytes, allowed);
  if (error != cudaSuccess) return error;
  const long long tiles = blocks(problem.M, kTileM) * blocks(problem.N, kTileN);
  kernel<<<static_cast<unsigned>(std::min<long long>(tiles, sms)), kThreads, kSharedBytes, stream>>>(maps, problem);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_layout(const LoraGemm& g, const Maps& maps, const Problem& problem, int sms, cudaStream_t stream) {
  const bool masked = g.mask != nullptr && g.R > 0;  // there is nothing to drop without a rank
  if (g.q_transposed != 0) {
    return masked ? launch<T, true, true>(maps, problem, sms, stream)
                  : launch<T, true, false>(maps, problem, sms, stream);
  }
  return masked ? launch<T, false, true>(maps, problem, sms, stream)
                : launch<T, false, false>(maps, problem, sms, stream);
}

bool sensible(const LoraGemm& g) {
  const bool positive = g.K > 0 && g.R >= 0 && std::max({g.M, g.N, g.K, g.R}) <= kMostCoordinate;
  const bool whole = g.N % 8 == 0 && g.K % 8 == 0 && g.R % 8 == 0;
  const bool tiles = (blocks(g.M, kTileM) + 1) * blocks(g.N, kTileN) < kMostCoordinate;
  return positive && whole && tiles && g.dtype >= 0 && g.dtype <= 1 && aligned(g.bias, 8);  // it is loaded in pairs
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
  const Problem problem = make_problem(g);
  const auto queue = static_cast<cudaStream_t>(stream);
  return g.dtype == 0 ? launch_layout<__nv_bfloat16>(g, maps, problem, sms, queue)
                      : launch_layout<__half>(g, maps, problem, sms, queue);
}
