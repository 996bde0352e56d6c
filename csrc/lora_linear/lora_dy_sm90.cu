// Host side of the dy pass: the plan, the tensor maps, the launches.
#include "lora_dy.cuh"
#include "lora_dy_sum.cuh"

#include "lora_dy_sm90.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

namespace {

using namespace lora_dy;

constexpr int kMaxDevices = 64;
constexpr long long kMost = 1ll << 30;  // coordinates are 32-bit

long long blocks(long long length, long long block) { return (length + block - 1) / block; }

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

// Clusters that run at once: the 132 SMs of an H100 lie in groups of 16 or 18, some with fewer, and hold 15 clusters of 8
// or 30 of 4 (asked of the driver; boards differ). One cluster too many takes as long as all the others.
int slots(int cluster, int sm_count) {
  if (cluster <= 2 || sm_count < 16) return std::max(1, sm_count / cluster);
  return std::max(1, sm_count * 15 / 132 * 8 / cluster);
}

// An estimate in ns. Main kernel: the slowest of DRAM, one CTA's TMA, and one CTA's products and exchanges; then the
// partial sums, written and read mostly in L2, and the second kernel's start.
double cost(const Sizes& sizes, const Cut& cut, int sm_count) {
  const double rp = padded_rank(sizes.R);
  const int stages = stages_of(cut.chunks);
  const long long clusters = cut.column_parts * cut.row_parts;
  const double waves = static_cast<double>(blocks(clusters, slots(cut.cluster, sm_count)));
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
      const long long at_once = std::max<long long>(1, slots(cluster, sm_count) / columns);
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
    return data != nullptr && pitch % 8 == 0 && pitch >= columns && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

CUtensorMapSwizzle swizzle_of(int columns) {
  return columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
         : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
         : columns == 16 ? CU_TENSOR_MAP_SWIZZLE_32B
                         : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Boxes of 64 rows; their columns say the swizzle, as lora_dy::Rows has it. Outside the matrix they read zeros.
bool make_map(CUtensorMap* map, const Matrix& matrix, int dtype, int columns) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr || !matrix.usable()) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(matrix.pitch) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), 64};
  const cuuint32_t strides[] = {1, 1};
  const CUtensorMapDataType type = dtype == 0 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 2, const_cast<void*>(matrix.data), sizes, pitches, box, strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(columns), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Inputs that no wanted output needs are not looked at: their maps are never used.
bool make_maps(Maps* maps, const LoraDy& a) {
  const int rp = padded_rank(a.R);
  if (!make_map(&maps->dy, {a.dy, a.M, a.N, a.ld_dy}, a.dtype, kChunk)) return false;
  maps->b = maps->s = maps->dy;
  if (a.g != nullptr && !make_map(&maps->b, {a.b, a.N, a.R, a.ld_b}, a.dtype, rp / 2)) return false;
  return a.db == nullptr || make_map(&maps->s, {a.s, a.M, a.R, a.R}, a.dtype, std::min(rp, kChunk));
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
cudaError_t prepare_kernel() {
  static std::atomic<bool> ready[kMaxDevices];  // racing threads set the attribute twice, which does no harm
  int device = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) return found;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (ready[device].load(std::memory_order_acquire)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(lora_dy_kernel<T, RP, CH>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 Layout<RP, CH>::kShared);
  if (error == cudaSuccess) ready[device].store(true, std::memory_order_release);
  return error;
}

cudaLaunchAttribute cluster_attribute(int cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

template <typename T, int RP, int CH>
cudaError_t launch(const Maps& maps, const Problem& problem, const Cut& cut, cudaStream_t stream) {
  const cudaError_t error = prepare_kernel<T, RP, CH>();
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = cluster_attribute(cut.cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cut.column_parts * cut.cluster), static_cast<unsigned>(cut.row_parts));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Layout<RP, CH>::kShared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;  // of one CTA too: st.async is an illegal instruction outside a cluster
  return cudaLaunchKernelEx(&config, lora_dy_kernel<T, RP, CH>, maps, problem, cut.cluster);
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
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
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
  const bool limits = a.M <= kMost && a.N <= kMost && a.dtype >= 0 && a.dtype <= 1;
  auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool pointers = aligned(a.g) && aligned(a.db) && aligned(a.dbias) && aligned(a.workspace);
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
