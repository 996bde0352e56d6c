// Host side of both passes: the plan, tensor maps, the choice of the instantiation, the launch.
#include "lora_x_sm90.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../common/sm90_host.h"
#include "lora_da.cuh"
#include "lora_down.cuh"

namespace {

using namespace lora_passes;

// ---- plans ----

struct Plan {
  int tile;         // rows (down) or columns (da) of x per output tile
  long long tiles;
  int stages;       // along the other side of x
  int ctas;         // per tile: a cluster shares the stages
};

// Bytes of x per ns that a CTA keeps up with: what it can load, or with many ranks per byte what "down" can multiply.
constexpr double kLoadRate = 45, kMultiplyRate = 20;

// An estimate in ns for x's `bytes`: each wave of clusters takes its share at the memory's rate, or at a CTA's where few
// are left, and a start. Measured on an H100 at K=4096, R=64: dlora_a at M=8192 30.2 us with clusters of 2, 42.5 with 8;
// down at M=2048 12.5 us with clusters of 4, 18.0 with 8. It says 25 and 37, 15 and 17.
double estimate(long long tiles, int ctas, double bytes, double cta_rate, int per_sm, int sm_count) {
  constexpr double kMemory = 3000, kStart = 2000;
  const double per_cta = bytes / static_cast<double>(tiles * ctas);
  double ns = 0;
  for (long long left = tiles; left > 0;) {
    const long long running = std::min(left, resident_clusters(ctas, per_sm, sm_count)), waves = left / running;
    ns += waves * (kStart + per_cta / std::min(cta_rate, kMemory / static_cast<double>(running * ctas)));
    left -= waves * running;
  }
  return ns;
}

// The most CTAs per tile (1, 2, 4 or 8, and no more than there are stages) within 5% of the least time.
int share_tile(long long tiles, long long stages, double bytes, double cta_rate, int per_sm, int sm_count) {
  const auto ns = [&](int ctas) { return estimate(tiles, ctas, bytes, cta_rate, per_sm, sm_count); };
  int most = 1;
  while (2 * most <= std::min<long long>(kMostCtas, stages)) most *= 2;
  double least = ns(1);
  for (int ctas = 2; ctas <= most; ctas *= 2) least = std::min(least, ns(ctas));
  while (ns(most) > 1.05 * least) most /= 2;
  return most;
}

// Every tile reads all of a. From rank 64 on, tiles of 64 rows would read as much of a as of x; 128 rows halve that,
// unless M is so small that the GPU would be left half empty.
Plan plan_down(long long M, long long K, long long R, int sm_count) {
  const bool tall = R > 32 && blocks(M, 128) * kMostCtas * 2 > sm_count;
  const int tile = tall ? 128 : 64;
  const long long tiles = blocks(M, tile), stages = blocks(K, kStageColumns);
  const int per_sm = R <= 16 ? ctas_per_sm(16) : 1;
  const double rate = R <= 32 ? kLoadRate : kMultiplyRate;
  return {tile, tiles, static_cast<int>(stages), share_tile(tiles, stages, 2.0 * M * K, rate, per_sm, sm_count)};
}

Plan plan_da(long long M, long long K, int sm_count) {
  const long long tiles = blocks(K, kStageColumns), stages = blocks(M, kDaRows);
  return {kStageColumns, tiles, static_cast<int>(stages), share_tile(tiles, stages, 2.0 * M * K, kLoadRate, 1, sm_count)};
}

// ---- launches ----

template <typename Kernel, typename Maps, typename Problem>
cudaError_t launch(Kernel kernel, const Maps& maps, const Problem& problem, const Plan& plan, int shared_bytes,
                   cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (plan.ctas > 1) attributes[count++] = cluster_attribute(plan.ctas);
  attributes[count++] = early_start_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.tiles * plan.ctas));
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, maps, problem);
}

// Calls f with R rounded up to 8, 16, 32, 64 or 128, as a constant.
template <typename F>
cudaError_t with_padded_r(long long R, const F& f) {
  if (R <= 8) return f(std::integral_constant<int, 8>());
  if (R <= 16) return f(std::integral_constant<int, 16>());
  if (R <= 32) return f(std::integral_constant<int, 32>());
  if (R <= 64) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, 128>());
}

bool sensible(long long M, long long K, long long R, int dtype, const Plan& plan) {
  const bool sizes = M > 0 && M <= kMostCoordinate && K > 0 && K <= kMostCoordinate && R > 0 && R <= 128 && R % 8 == 0;
  return sizes && (dtype == 0 || dtype == 1) && plan.tiles * plan.ctas <= kMostCoordinate;
}

template <typename T, int PADDED_R, int ROWS, bool DROP>
cudaError_t launch_down(const LoraDown& d, const Plan& plan, const DownProblem& problem, cudaStream_t stream) {
  using Shape = DownShape<PADDED_R, ROWS>;
  const auto kernel = lora_down_kernel<T, PADDED_R, ROWS, DROP>;
  DownMaps maps;
  if (!make_map(&maps.x, {d.x, d.M, d.K, d.ld_x, d.dtype}, 64, ROWS) ||
      !make_map(&maps.a, {d.a, d.R, d.K, d.ld_a, d.dtype}, 64, PADDED_R)) {
    return cudaErrorInvalidValue;
  }
  static SharedAllowed allowed;
  const cudaError_t error = allow_shared(kernel, Shape::Memory::kBytes, allowed);
  if (error != cudaSuccess) return error;
  return launch(kernel, maps, problem, plan, Shape::Memory::kBytes, stream);
}

template <typename T, int PADDED_R, int ROWS>
cudaError_t launch_down_dropout(const LoraDown& d, const Plan& plan, const DownProblem& problem, cudaStream_t stream) {
  return d.seed != nullptr ? launch_down<T, PADDED_R, ROWS, true>(d, plan, problem, stream)
                           : launch_down<T, PADDED_R, ROWS, false>(d, plan, problem, stream);
}

template <typename T>
cudaError_t launch_down_shape(const LoraDown& d, const Plan& plan, const DownProblem& problem, cudaStream_t stream) {
  return with_padded_r(d.R, [&](auto padded) {
    constexpr int kPadded = decltype(padded)::value;
    if constexpr (kPadded > 32) {
      if (plan.tile == 128) return launch_down_dropout<T, kPadded, 128>(d, plan, problem, stream);
    }
    return launch_down_dropout<T, kPadded, 64>(d, plan, problem, stream);
  });
}

template <typename T, int PADDED_R, bool MASKED>
cudaError_t launch_da(const LoraDa& d, const Plan& plan, const DaProblem& problem, cudaStream_t stream) {
  using Shape = DaShape<PADDED_R>;
  const auto kernel = lora_da_kernel<T, PADDED_R, MASKED>;
  DaMaps maps;
  if (!make_map(&maps.x, {d.x, d.M, d.K, d.ld_x, d.dtype}, 64, kDaRows) ||
      !make_map(&maps.g, {d.g, d.M, d.R, d.R, d.dtype}, std::min(PADDED_R, 64), kDaRows)) {
    return cudaErrorInvalidValue;
  }
  maps.mask = maps.x;
  if (MASKED && !make_map(&maps.mask, {d.mask, d.M, d.K / 8, d.K / 8, kByteType}, kStageColumns / 8, kDaRows)) {
    return cudaErrorInvalidValue;
  }
  static SharedAllowed allowed;
  const cudaError_t error = allow_shared(kernel, Shape::Memory::kBytes, allowed);
  if (error != cudaSuccess) return error;
  return launch(kernel, maps, problem, plan, Shape::Memory::kBytes, stream);
}

template <typename T>
cudaError_t launch_da_shape(const LoraDa& d, const Plan& plan, const DaProblem& problem, cudaStream_t stream) {
  return with_padded_r(d.R, [&](auto padded) {
    constexpr int kPadded = decltype(padded)::value;
    return d.mask != nullptr ? launch_da<T, kPadded, true>(d, plan, problem, stream)
                             : launch_da<T, kPadded, false>(d, plan, problem, stream);
  });
}

}  // namespace

extern "C" int lora_down_sm90(const LoraDown* args, int sm_count, void* stream) {
  const LoraDown& d = *args;
  if (d.M == 0) return cudaSuccess;
  const Plan plan = plan_down(d.M, d.K, d.R, std::max(1, sm_count));
  const bool drops = d.seed != nullptr;
  if (!sensible(d.M, d.K, d.R, d.dtype, plan) || !aligned(d.s, 8) ||
      (drops && (d.mask == nullptr || d.threshold < 1 || d.threshold > 65536))) {
    return cudaErrorInvalidValue;
  }
  DownProblem problem{};
  problem.s = d.s;
  problem.M = static_cast<int>(d.M);
  problem.R = static_cast<int>(d.R);
  problem.stages = plan.stages;
  problem.ctas = plan.ctas;
  const int row_bytes = static_cast<int>(d.K / 8);
  const bool wide = row_bytes % 8 == 0 && aligned(d.mask, 8);
  problem.dropout = {d.seed, d.mask, (d.threshold << 16) - 1, row_bytes, wide};
  const auto queue = static_cast<cudaStream_t>(stream);
  return d.dtype == 0 ? launch_down_shape<__nv_bfloat16>(d, plan, problem, queue)
                      : launch_down_shape<__half>(d, plan, problem, queue);
}

extern "C" int lora_da_sm90(const LoraDa* args, int sm_count, void* stream) {
  const LoraDa& d = *args;
  const Plan plan = plan_da(d.M, d.K, std::max(1, sm_count));
  if (!sensible(d.M, d.K, d.R, d.dtype, plan) || !aligned(d.da, 16)) {
    return cudaErrorInvalidValue;
  }
  DaProblem problem{};
  problem.da = d.da;
  problem.scaling = d.scaling;
  problem.M = static_cast<int>(d.M);
  problem.K = static_cast<int>(d.K);
  problem.R = static_cast<int>(d.R);
  problem.stages = plan.stages;
  problem.ctas = plan.ctas;
  problem.da_fp32 = d.da_fp32 != 0;
  const auto queue = static_cast<cudaStream_t>(stream);
  return d.dtype == 0 ? launch_da_shape<__nv_bfloat16>(d, plan, problem, queue)
                      : launch_da_shape<__half>(d, plan, problem, queue);
}
