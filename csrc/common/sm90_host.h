// Host side that the Hopper kernels share: tensor maps, the permission for large shared memory, what runs at once.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace peft_kernels {
namespace sm90 {

constexpr int kMaxDevices = 64;
constexpr long long kMostCoordinate = 1ll << 30;  // a tensor map's coordinates are 32-bit

// How many blocks of that size it takes to cover the length.
inline long long blocks(long long length, long long block) { return (length + block - 1) / block; }

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// ---- tensor maps ----

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time, so that the library needs no -lcuda.
inline EncodeTiled encode_tiled() {
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

constexpr int kByteType = 2;  // a dtype beside the C APIs' 0 (bfloat16) and 1 (float16): a packed mask's

struct Matrix {
  const void* data;
  long long rows, columns, pitch;  // in elements
  int dtype;

  int element_bytes() const { return dtype == kByteType ? 1 : 2; }
  bool usable() const {
    return data != nullptr && aligned(data, 16) && rows > 0 && columns > 0 && pitch >= columns &&
           pitch * element_bytes() % 16 == 0;
  }
};

inline CUtensorMapSwizzle swizzle_of(int row_bytes) {
  return row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                           : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Boxes of box_columns (16, 32, 64 or 128 bytes, swizzled over that width: OperandRows in sm90_wgmma.cuh) by box_rows.
// Outside the matrix they read zeros and write nothing.
inline bool make_map(CUtensorMap* map, const Matrix& matrix, int box_columns, int box_rows) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr || !matrix.usable()) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(matrix.pitch) * matrix.element_bytes()};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t strides[] = {1, 1};
  const CUtensorMapDataType type = matrix.dtype == kByteType ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : matrix.dtype == 0       ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 2, const_cast<void*>(matrix.data), sizes, pitches, box, strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box_columns * matrix.element_bytes()),
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---- launches ----

// On which devices a kernel has been allowed its shared memory: a static variable of each kernel's launch.
struct SharedAllowed {
  std::atomic<bool> on[kMaxDevices];
};

// Lets CTAs of the kernel have that much dynamic shared memory, which above 48 KiB has to be asked for once per device.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes, SharedAllowed& allowed) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (allowed.on[device].load(std::memory_order_acquire)) return cudaSuccess;  // racing threads set it twice: no harm
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.on[device].store(true, std::memory_order_release);
  return error;
}

inline cudaLaunchAttribute cluster_attribute(int ctas) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(ctas);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Programmatic dependent launch: the kernel's start overlaps the end of the one before, for which the kernel itself
// waits (wait_for_previous_kernels).
inline cudaLaunchAttribute early_start_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Clusters that run at once: the 132 SMs of an H100 lie in groups of 16 or 18, some with fewer, and hold 15 clusters of
// 8 or 30 of 4 (asked of the driver; boards differ). Fewer than 16 SMs, a slice of a GPU, are taken for one group.
inline long long resident_clusters(int ctas, int ctas_per_sm, int sm_count) {
  const int clusters = ctas <= 2 || sm_count < 16 ? sm_count / ctas : sm_count * 15 / 132 * 8 / ctas;
  return static_cast<long long>(ctas_per_sm) * std::max(1, clusters);
}

}  // namespace sm90
}  // namespace peft_kernels
