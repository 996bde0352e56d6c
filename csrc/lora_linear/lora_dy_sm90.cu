// Host side of the dy pass: the plan, the tensor maps, the launches.
#include "lora_dy.cuh"
#include "lora_dy_sum.cuh"

#include "../common/sm90_host.h"
#include "lora_dy_sm90.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace {

using namespace lora_dy;

// ---- the plan ----

int padded_rank(long long R) { return R <= 16 ? 16 : R <= 32 ? 32 : R <= 64 ? 64 : 128; }

// Stages per step: the kernel exists for 1, 2 and 4.
int stages_of(int chunks) { return chunks <= 2 ? 1 : chunks <= 4 ? 2 : 4; }

struct Sizes {
  long long M, N, R;
  bool need_g, need_db, need_dbias;

  long long tiles() const { return blocks(M, kStepRows); }
};

// A plan with everything that follows from it.
struct Cut {
  int cluster, chunks;
  long long column_parts;  // clusters side by side: partial sums of g
  long long span, row_parts;  // tiles of 64 rows per part; partial sums of db and dbias

  Cut(const Sizes& sizes, const LoraDyPlan& plan) : cluster(plan.cluster), chunks(plan.chunks) {
    column_parts = blocks(sizes.N, static_cast<long long>(chunks) * kChunk * cluster);
    span = blocks(sizes.tiles(), std::max(1, plan.row_parts));
    row_parts = blocks(sizes.tiles(), span);
  }
  long long g_floats(const Sizes& sizes) const {
    return sizes.need_g && column_parts > 1 ? column_parts * sizes.M * sizes.R : 0;
  }
  long long db_floats(const Sizes& sizes) const {
    return sizes.need_db && row_parts > 1 ? row_parts * sizes.N * sizes.R : 0;
  }
  long long dbias_floats(const Sizes& sizes) const {
    return sizes.need_dbias && row_parts > 1 ? row_parts * sizes.N : 0;
  }
  long long floats(const Sizes& sizes) const { return g_floats(sizes) + db_floats(sizes) + dbias_floats(sizes); }
};

// An estimate in ns. Main kernel: the slowest of DRAM, one CTA's TMA, and one CTA's products and exchanges; then the
// partial sums, written and read mostly in L2, and the second kernel's start.
double cost(const Sizes& sizes, const Cut& cut, int sm_count) {
  const double rp = padded_rank(sizes.R);
  const int stages = stages_of(cut.chunks);
  const long long clusters = cut.column_parts * cut.row_parts;
  const double waves = static_cast<double>(blocks(clusters, resident_clusters(cut.cluster, 1, sm_count)));
  const double bytes = static_cast<double>(cut.span) * cut.chunks * kBoxBytes;
  const double busy = std::min<double>(static_cast<double>(clusters) * cut.cluster / waves, sm_count);
  const double dram = bytes * busy / 3000, tma = bytes / 45;
  const double exchange = sizes.need_g ? 250 + 2.5 * rp : 100;
  const double products = cut.span * (stages * (380 + 2.5 * rp) + exchange);
  const double partial_bytes = 4.0 * cut.floats(sizes);
  const double fixed = (partial_bytes > 0 ? 1500 : 0) + 10 * cut.cluster;  // smaller clusters where nothing else counts
  return waves * std::max({dram, tma, products}) + 2 * partial_bytes / 4500 + fixed;
}

LoraDyPlan choose_plan(const Sizes& sizes, int sm_count) {
  constexpr int kChunks[] = {8, 7, 4, 3, 2, 1};
  LoraDyPlan best{1, 1, 1};
  double least = 1e300;
  for (int cluster = sizes.need_g ? 8 : 1; cluster >= 1; cluster /= 2) {
    for (const int chunks : kChunks) {
      if (chunks > 4 && sizes.R > 64) continue;
      const long long columns = blocks(sizes.N, static_cast<long long>(chunks) * kChunk * cluster);
      const long long at_once = std::max<long long>(1, resident_clusters(cluster, 1, sm_count) / columns);
      for (const long long parts : {at_once, at_once / 2, 2 * at_once}) {
        LoraDyPlan plan{cluster, chunks, static_cast<int>(std::min(std::max(parts, 1ll), sizes.tiles()))};
        const Cut cut(sizes, plan);
        plan.row_parts = static_cast<int>(cut.row_parts);
        const double estimate = cost(sizes, cut, sm_count);
        if (estimate < least) least = estimate, best = plan;
      }
    }
  }
  return best;
}

bool usable(const LoraDyPlan& plan, long long R) {
  const bool cluster = plan.cluster == 1 || plan.cluster == 2 || plan.cluster == 4 || plan.cluster == 8;
  const bool chunks = (plan.chunks >= 1 && plan.chunks <= 4) || plan.chunks == 7 || plan.chunks == 8;
  return cluster && chunks && (plan.chunks <= 4 || R <= 64) && plan.row_parts >= 1;
}

// ---- tensor maps ----

// Inputs that no wanted output needs are not looked at: their maps are never used.
bool make_maps(Maps* maps, const LoraDy& a) {
  const int rp = padded_rank(a.R);
  if (!make_map(&maps->dy, {a.dy, a.M, a.N, a.ld_dy, a.dtype}, kChunk, kStepRows)) return false;
  maps->b = maps->s = maps->dy;
  if (a.g != nullptr && !make_map(&maps->b, {a.b, a.N, a.R, a.ld_b, a.dtype}, rp / 2, kChunk)) return false;
  return a.db == nullptr || make_map(&maps->s, {a.s, a.M, a.R, a.R, a.dtype}, std::min(rp, kChunk), kStepRows);
}

// ---- launches ----

Sizes sizes_of(const LoraDy& a) { return {a.M, a.N, a.R, a.g != nullptr, a.db != nullptr, a.dbias != nullptr}; }

Problem make_problem(const LoraDy& a, const Sizes& sizes, const Cut& cut) {
  Problem problem{};
  problem.g = {a.g, 0, 1.f, false};
  problem.db = {a.db, 0, a.scaling, a.db_fp32 != 0};
  problem.dbias = {a.dbias, 0, 1.f, true};
  float* next = a.workspace;
  auto partial = [&](Output* output, long long floats, long long pitch) {
    if (floats == 0) return;
    output->data = next, output->pitch = pitch;
    next += floats;
  };
  partial(&problem.g, cut.g_floats(sizes), a.M * a.R);
  partial(&problem.db, cut.db_floats(sizes), a.N * a.R);
  partial(&problem.dbias, cut.dbias_floats(sizes), a.N);
  problem.M = static_cast<int>(a.M), problem.N = static_cast<int>(a.N), problem.R = static_cast<int>(a.R);
  problem.chunks = cut.chunks;
  problem.tiles = static_cast<int>(sizes.tiles());
  problem.span = static_cast<int>(cut.span);
  return problem;
}

template <typename T, int RP, int CH>
cudaError_t launch(const Maps& maps, const Problem& problem, const Cut& cut, cudaStream_t stream) {
  const auto kernel = lora_dy_kernel<T, RP, CH>;
  static SharedAllowed allowed;
  const cudaError_t error = allow_shared(kernel, Layout<RP, CH>::kShared, allowed);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = cluster_attribute(cut.cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cut.column_parts * cut.cluster), static_cast<unsigned>(cut.row_parts));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Layout<RP, CH>::kShared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;  // of one CTA too: st.async is an illegal instruction outside a cluster
  return cudaLaunchKernelEx(&config, kernel, maps, problem, cut.cluster);
}

template <typename T>
cudaError_t launch_any(const Maps& maps, const Problem& problem, const Cut& cut, cudaStream_t stream) {
  const int rp = padded_rank(problem.R), stages = stages_of(cut.chunks);
#define LORA_CASE(RP, CH) \
  if (rp == RP && stages == CH) return launch<T, RP, CH>(maps, problem, cut, stream)
  LORA_CASE(16, 1);
  LORA_CASE(16, 2);
  LORA_CASE(16, 4);
  LORA_CASE(32, 1);
  LORA_CASE(32, 2);
  LORA_CASE(32, 4);
  LORA_CASE(64, 1);
  LORA_CASE(64, 2);
  LORA_CASE(64, 4);
  LORA_CASE(128, 1);
  LORA_CASE(128, 2);
#undef LORA_CASE
  return cudaErrorInvalidValue;
}

// The jobs of the second kernel; returns its number of blocks, 0 if every output is final already.
unsigned make_jobs(SumJobs* jobs, const LoraDy& a, const Problem& problem, const Cut& cut) {
  unsigned end = 0;
  int used = 0;
  auto add = [&](const Output& from, void* out, long long count, int kind) {
    if (from.data == nullptr || from.pitch == 0) return;
    jobs->job[used] = {static_cast<const float*>(from.data), out, from.pitch / 4, static_cast<int>(count), kind,
                       from.scale};
    end += static_cast<unsigned>(blocks(from.pitch / 4, kSumThreads));
    jobs->blocks[used++] = end;
  };
  add(problem.db, a.db, cut.row_parts, a.db_fp32 != 0 ? 2 : a.dtype);
  add(problem.g, a.g, cut.column_parts, a.dtype);
  add(problem.dbias, a.dbias, cut.row_parts, 2);
  for (; used > 0 && used < kSumJobs; ++used) jobs->blocks[used] = end;
  return end;
}

// Starts while the main kernel ends, and waits there for its last write (programmatic dependent launch).
cudaError_t launch_sum(const SumJobs& jobs, unsigned grid, cudaStream_t stream) {
  cudaLaunchAttribute early = early_start_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kSumThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, lora_dy_sum_kernel, jobs);
}

bool sensible(const LoraDy& a) {
  const bool sizes = a.M >= 1 && a.N >= 8 && a.N % 8 == 0 && a.R >= 8 && a.R % 8 == 0 && a.R <= 128;
  const bool limits = a.M <= kMostCoordinate && a.N <= kMostCoordinate && a.dtype >= 0 && a.dtype <= 1;
  const bool pointers = aligned(a.g, 16) && aligned(a.db, 16) && aligned(a.dbias, 16) && aligned(a.workspace, 16);
  return sizes && limits && pointers && (a.g != nullptr || a.db != nullptr || a.dbias != nullptr);
}

cudaError_t run(const LoraDy& a, const LoraDyPlan& plan, cudaStream_t stream) {
  const Sizes sizes = sizes_of(a);
  const Cut cut(sizes, plan);
  Maps maps;
  if (cut.row_parts > 65535 || (cut.floats(sizes) > 0 && a.workspace == nullptr)) return cudaErrorInvalidValue;
  if (!make_maps(&maps, a)) return cudaErrorInvalidValue;
  const Problem problem = make_problem(a, sizes, cut);
  const cudaError_t error = a.dtype == 0 ? launch_any<__nv_bfloat16>(maps, problem, cut, stream)
                                         : launch_any<__half>(maps, problem, cut, stream);
  SumJobs jobs{};
  const unsigned grid = make_jobs(&jobs, a, problem, cut);
  return error != cudaSuccess || grid == 0 ? error : launch_sum(jobs, grid, stream);
}

Sizes make_sizes(long long M, long long N, long long R, int need_g, int need_db, int need_dbias) {
  return {M, N, R, need_g != 0, need_db != 0, need_dbias != 0};
}

}  // namespace

extern "C" LoraDyPlan lora_dy_plan(long long M, long long N, long long R, int need_g, int need_db, int need_dbias,
                                   int sm_count) {
  return choose_plan(make_sizes(M, N, R, need_g, need_db, need_dbias), sm_count);
}

extern "C" long long lora_dy_workspace_planned(long long M, long long N, long long R, int need_g, int need_db,
                                               int need_dbias, const LoraDyPlan* plan) {
  const Sizes sizes = make_sizes(M, N, R, need_g, need_db, need_dbias);
  return 4 * Cut(sizes, *plan).floats(sizes);
}

extern "C" long long lora_dy_workspace(long long M, long long N, long long R, int need_g, int need_db, int need_dbias,
                                       int sm_count) {
  const LoraDyPlan plan = lora_dy_plan(M, N, R, need_g, need_db, need_dbias, sm_count);
  return lora_dy_workspace_planned(M, N, R, need_g, need_db, need_dbias, &plan);
}

extern "C" int lora_dy_sm90_planned(const LoraDy* args, const LoraDyPlan* plan, void* stream) {
  if (!sensible(*args) || !usable(*plan, args->R)) return cudaErrorInvalidValue;
  return run(*args, *plan, static_cast<cudaStream_t>(stream));
}

extern "C" int lora_dy_sm90(const LoraDy* args, int sm_count, void* stream) {
  if (!sensible(*args) || sm_count < 1) return cudaErrorInvalidValue;
  return run(*args, choose_plan(sizes_of(*args), sm_count), static_cast<cudaStream_t>(stream));
}
