// The activation pass: dz = dy * act'(z) and its column sums, by the row pass of csrc/common/column_sum*.cuh, whose loader
// here reads two operands, writes dz and hands on the products; and the forward of ReLU with its bits.
//
// Floor: dy and z read, dz written, at HBM's bandwidth: 201 MB of bf16 at [8192, 4096], 67 us at 3.0 TB/s; ReLU 138 MB,
// 46 us. In flight: 2 blocks per SM * 256 threads * 4 rows * 32 bytes = 66 KB at the start of a part of a batch, three
// times what the latency asks for. Sums go to fp32 first, in the workspace or in dbias itself; where dbias has 16 bits
// they are rounded once more.
#include "act_cuda.h"

#include "../common/activations.cuh"
#include "../common/column_sum_launch.cuh"

namespace peft_kernels {

namespace {

constexpr int kRelu = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3;
constexpr int kBFloat16 = 0, kHalf = 1, kFloat32 = 2;

__device__ __forceinline__ uint4 load_16_bytes(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// What the two kinds of activations keep, read beside dy: z by 16 bytes or one by one, or bits.
template <typename T, typename Slope>
struct WideActRows {
  struct Raw {
    uint4 dy, z;
  };
  static constexpr int kColumns = kWide<T>, kInFlight = 4, kBlocksPerSm = 2;
  const T *dy, *z;
  T* dz;  // or null
  long long dy_row, z_row, N;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    return {load_16_bytes(dy + row * dy_row + column), load_16_bytes(z + row * z_row + column)};
  }
  __device__ __forceinline__ void values(const Raw& raw, long long row, long long column, float (&out)[kColumns]) const {
    float z_values[kColumns];
    unpack<T>(raw.dy, out);
    unpack<T>(raw.z, z_values);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] = __fmul_rn(out[c], Slope::at(z_values[c]));
    if (dz != nullptr) store_16(dz + row * N + column, pack<T>(out));
  }
};

template <typename T>
struct WideReluRows {
  struct Raw {
    uint4 dy;
    unsigned char bits;
  };
  static constexpr int kColumns = kWide<T>, kInFlight = 4, kBlocksPerSm = 2;
  const T* dy;
  const unsigned char* mask;
  T* dz;
  long long dy_row, mask_row, N;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    return {load_16_bytes(dy + row * dy_row + column), __ldg(mask + row * mask_row + column / 8)};
  }
  __device__ __forceinline__ void values(const Raw& raw, long long row, long long column, float (&out)[kColumns]) const {
    const int bits = raw.bits >> (column % 8);
    unpack<T>(raw.dy, out);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] = (bits >> c & 1) != 0 ? out[c] : 0.0f;
    if (dz != nullptr) store_16(dz + row * N + column, pack<T>(out));
  }
};

// Elements anywhere; the activation is a number.
template <typename T>
struct AnyActRows {
  struct Raw {
    T dy, z;
  };
  static constexpr int kColumns = 1, kInFlight = 4, kBlocksPerSm = 3;
  const T *dy, *z;
  T* dz;
  long long dy_row, dy_column, z_row, z_column, N;
  int activation;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    return {__ldg(dy + row * dy_row + column * dy_column), __ldg(z + row * z_row + column * z_column)};
  }
  __device__ __forceinline__ void values(const Raw& raw, long long row, long long column, float (&out)[1]) const {
    const float z_value = to_float(raw.z);
    const float slope = activation == kGelu       ? GeluSlope::at(z_value)
                        : activation == kGeluTanh ? GeluTanhSlope::at(z_value)
                                                  : SiluSlope::at(z_value);
    out[0] = __fmul_rn(to_float(raw.dy), slope);
    if (dz != nullptr) from_float(out[0], dz[row * N + column]);
  }
};

template <typename T>
struct AnyReluRows {
  struct Raw {
    T dy;
    unsigned char bits;
  };
  static constexpr int kColumns = 1, kInFlight = 4, kBlocksPerSm = 3;
  const T* dy;
  const unsigned char* mask;
  T* dz;
  long long dy_row, dy_column, mask_row, mask_column, N;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    return {__ldg(dy + row * dy_row + column * dy_column), __ldg(mask + row * mask_row + column / 8 * mask_column)};
  }
  __device__ __forceinline__ void values(const Raw& raw, long long row, long long column, float (&out)[1]) const {
    out[0] = (raw.bits >> (column % 8) & 1) != 0 ? to_float(raw.dy) : 0.0f;
    if (dz != nullptr) from_float(out[0], dz[row * N + column]);
  }
};

// ---- the forward of ReLU: eight columns, a byte of the mask, at a time ----

// Writes the byte, and leaves 0 in what does not pass.
__device__ __forceinline__ void stop(float (&z)[8], unsigned char* byte) {
  unsigned bits = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const bool passes = !(z[c] <= 0.0f);
    bits |= static_cast<unsigned>(passes) << c;
    z[c] = passes ? z[c] : 0.0f;
  }
  *byte = static_cast<unsigned char>(bits);
}

template <typename T>
struct WideRelu {
  static constexpr int kLoads = 8 / kWide<T>, kColumns = 8, kInFlight = 4, kBlocksPerSm = 2;
  struct Raw {
    uint4 z[kLoads];
  };
  const T* z;
  T* y;
  unsigned char* mask;
  long long row_stride, N;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw.z[i] = load_16_bytes(z + row * row_stride + column + i * kWide<T>);
    return raw;
  }
  __device__ __forceinline__ void values(const Raw& raw, long long row, long long column, float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float part[kWide<T>];
      unpack<T>(raw.z[i], part);
#pragma unroll
      for (int c = 0; c < kWide<T>; ++c) out[i * kWide<T> + c] = part[c];
    }
    stop(out, mask + row * (N / 8) + column / 8);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float part[kWide<T>];
#pragma unroll
      for (int c = 0; c < kWide<T>; ++c) part[c] = out[i * kWide<T> + c];
      store_16(y + row * N + column + i * kWide<T>, pack<T>(part));
    }
  }
};

template <typename T>
struct AnyRelu {
  static constexpr int kColumns = 8, kInFlight = 4, kBlocksPerSm = 2;
  struct Raw {
    T z[8];
  };
  const T* z;
  T* y;
  unsigned char* mask;
  long long row_stride, column_stride, N;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    Raw raw;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (column + c < N) raw.z[c] = __ldg(z + row * row_stride + (column + c) * column_stride);
    return raw;
  }
  __device__ __forceinline__ void values(const Raw& raw, long long row, long long column, float (&out)[8]) const {
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] = column + c < N ? to_float(raw.z[c]) : 0.0f;
    stop(out, mask + row * ((N + 7) / 8) + column / 8);
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (column + c < N) from_float(out[c], y[row * N + column + c]);
  }
};

// ---- a row pass without sums ----

template <typename Rows>
__device__ __forceinline__ void visit_batch(const Rows& rows, long long row, long long end, long long step,
                                            long long column) {
  typename Rows::Raw raw[Rows::kInFlight];
#pragma unroll
  for (int i = 0; i < Rows::kInFlight; ++i)
    if (row + i * step < end) raw[i] = rows.load(row + i * step, column);
#pragma unroll
  for (int i = 0; i < Rows::kInFlight; ++i) {
    float values[Rows::kColumns];
    if (row + i * step < end) rows.values(raw[i], row + i * step, column, values);
  }
}

template <typename Rows>
__global__ void __launch_bounds__(kSumThreads, Rows::kBlocksPerSm) visit_kernel(const Rows rows, const ColumnSum shape) {
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes, row = static_cast<int>(threadIdx.x) / shape.lanes;
  const long long column = (static_cast<long long>(blockIdx.x) * shape.lanes + lane) * Rows::kColumns;
  if (column >= shape.N) return;
  const long long begin = blockIdx.y * shape.rows_per_part, step = kSumThreads / shape.lanes;
  const long long end = begin + shape.rows_per_part < shape.M ? begin + shape.rows_per_part : shape.M;
  for (long long first = begin + row; first < end; first += Rows::kInFlight * step)
    visit_batch(rows, first, end, step, column);
}

template <typename Rows>
cudaError_t visit(const Rows& rows, const ColumnSumPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts));
  return launch(visit_kernel<Rows>, grid, dim3(kSumThreads), 0, stream, rows, plan.shape);
}

// ---- which of them ----

bool on_16_bytes(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

bool wide_rows(const void* p, long long row, long long column, long long M, int wide) {
  return on_16_bytes(p) && column == 1 && (row % wide == 0 || M == 1);
}

// Columns per 16-byte access where all three matrices allow it, else 1.
int columns_per_load(const ActBwd& a) {
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  const bool kept = a.activation == kRelu ? a.kept_column == 1 : wide_rows(a.kept, a.kept_row, a.kept_column, a.M, wide);
  return a.N % wide == 0 && on_16_bytes(a.dz) && kept && wide_rows(a.dy, a.dy_row, a.dy_column, a.M, wide) ? wide : 1;
}

ColumnSumPlan plan_for(const ActBwd& a, int sm_count) {
  const int columns = columns_per_load(a);
  const long long blocks = columns > 1 ? WideReluRows<float>::kBlocksPerSm : AnyReluRows<float>::kBlocksPerSm;
  return plan_column_sum(a.M, a.N, columns, blocks * sm_count,
                         columns == 1 && a.dy_row < a.dy_column);
}

// Whether dbias itself takes the sums of the only part.
bool sums_are_dbias(const ActBwd& a, const ColumnSumPlan& plan) {
  return plan.parts == 1 && (a.dbias_fp32 != 0 || a.dtype == kFloat32);
}

long long workspace_bytes(const ActBwd& a, const ColumnSumPlan& plan) {
  return a.dbias == nullptr || sums_are_dbias(a, plan) ? 0 : plan.parts * a.N * static_cast<long long>(sizeof(float));
}

template <typename Out>
cudaError_t add_parts(const ActBwd& a, const ColumnSumPlan& plan, cudaStream_t stream) {
  const int lanes = lanes_for(a.N, false);
  const ColumnSumPlan one_part{{plan.parts, a.N, plan.parts, lanes}, ceil_div(a.N, lanes), 1};
  return launch_column_sum<1>(AnyRows<float>{a.workspace, a.N, 1}, static_cast<Out*>(a.dbias), one_part, stream);
}

template <typename T, typename Rows>
cudaError_t run_rows(const ActBwd& a, const Rows& rows, const ColumnSumPlan& plan, cudaStream_t stream) {
  if (a.dbias == nullptr) return a.M == 0 ? cudaSuccess : visit(rows, plan, stream);
  const bool direct = sums_are_dbias(a, plan);
  float* sums = direct ? static_cast<float*>(a.dbias) : a.workspace;
  const cudaError_t error = launch_column_sum<kBatch>(rows, sums, plan, stream);
  if (error != cudaSuccess || direct) return error;
  return a.dbias_fp32 != 0 ? add_parts<float>(a, plan, stream) : add_parts<T>(a, plan, stream);
}

template <typename T, typename Slope>
cudaError_t run_wide(const ActBwd& a, const ColumnSumPlan& plan, cudaStream_t stream) {
  const WideActRows<T, Slope> rows{static_cast<const T*>(a.dy), static_cast<const T*>(a.kept), static_cast<T*>(a.dz),
                                   a.dy_row,                    a.kept_row,                    a.N};
  return run_rows<T>(a, rows, plan, stream);
}

template <typename T>
cudaError_t run(const ActBwd& a, const ColumnSumPlan& plan, cudaStream_t stream) {
  const T* dy = static_cast<const T*>(a.dy);
  const auto* mask = static_cast<const unsigned char*>(a.kept);
  T* dz = static_cast<T*>(a.dz);
  const bool wide = columns_per_load(a) > 1;
  if (wide && a.activation == kGelu) return run_wide<T, GeluSlope>(a, plan, stream);
  if (wide && a.activation == kGeluTanh) return run_wide<T, GeluTanhSlope>(a, plan, stream);
  if (wide && a.activation == kSilu) return run_wide<T, SiluSlope>(a, plan, stream);
  if (wide) return run_rows<T>(a, WideReluRows<T>{dy, mask, dz, a.dy_row, a.kept_row, a.N}, plan, stream);
  if (a.activation == kRelu) {
    const AnyReluRows<T> rows{dy, mask, dz, a.dy_row, a.dy_column, a.kept_row, a.kept_column, a.N};
    return run_rows<T>(a, rows, plan, stream);
  }
  const T* z = static_cast<const T*>(a.kept);
  const AnyActRows<T> rows{dy, z, dz, a.dy_row, a.dy_column, a.kept_row, a.kept_column, a.N, a.activation};
  return run_rows<T>(a, rows, plan, stream);
}

bool valid(const ActBwd& a, int sm_count) {
  return a.M >= 0 && a.N >= 0 && a.dy_row >= 0 && a.dy_column >= 0 && a.kept_row >= 0 && a.kept_column >= 0 &&
         sm_count > 0 && a.activation >= kRelu && a.activation <= kSilu && a.dtype >= kBFloat16 && a.dtype <= kFloat32;
}

cudaError_t act_bwd(const ActBwd& a, int sm_count, cudaStream_t stream) {
  if (!valid(a, sm_count)) return cudaErrorInvalidValue;
  if (a.N == 0 || (a.dz == nullptr && a.dbias == nullptr)) return cudaSuccess;
  const ColumnSumPlan plan = plan_for(a, sm_count);
  if (!plan.fits_a_grid()) return cudaErrorInvalidConfiguration;
  if ((a.dy == nullptr || a.kept == nullptr) && a.M > 0) return cudaErrorInvalidValue;
  if (a.workspace == nullptr && workspace_bytes(a, plan) > 0) return cudaErrorInvalidValue;
  if (a.dtype == kBFloat16) return run<__nv_bfloat16>(a, plan, stream);
  if (a.dtype == kHalf) return run<__half>(a, plan, stream);
  return run<float>(a, plan, stream);
}

template <typename T>
cudaError_t run_relu(const ReluFwd& a, bool wide, const ColumnSumPlan& plan, cudaStream_t stream) {
  const T* z = static_cast<const T*>(a.z);
  T* y = static_cast<T*>(a.y);
  if (wide) return visit(WideRelu<T>{z, y, a.mask, a.row, a.N}, plan, stream);
  return visit(AnyRelu<T>{z, y, a.mask, a.row, a.column, a.N}, plan, stream);
}

cudaError_t relu_fwd(const ReluFwd& a, int sm_count, cudaStream_t stream) {
  if (a.M < 0 || a.N < 0 || a.row < 0 || a.column < 0 || sm_count <= 0) return cudaErrorInvalidValue;
  if (a.dtype < kBFloat16 || a.dtype > kFloat32) return cudaErrorInvalidValue;
  if (a.M == 0 || a.N == 0) return cudaSuccess;
  if (a.z == nullptr || a.y == nullptr || a.mask == nullptr) return cudaErrorInvalidValue;
  constexpr long long blocks = WideRelu<float>::kBlocksPerSm;
  const bool wide = a.N % 8 == 0 && on_16_bytes(a.y) && wide_rows(a.z, a.row, a.column, a.M, a.dtype == kFloat32 ? 4 : 8);
  const ColumnSumPlan plan = plan_column_sum(a.M, ceil_div(a.N, 8) * 8, 8, blocks * sm_count, !wide && a.row < a.column);
  if (!plan.fits_a_grid()) return cudaErrorInvalidConfiguration;
  if (a.dtype == kBFloat16) return run_relu<__nv_bfloat16>(a, wide, plan, stream);
  if (a.dtype == kHalf) return run_relu<__half>(a, wide, plan, stream);
  return run_relu<float>(a, wide, plan, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

long long act_bwd_workspace(const ActBwd* args, int sm_count) {
  if (!peft_kernels::valid(*args, sm_count) || args->N == 0) return 0;
  return peft_kernels::workspace_bytes(*args, peft_kernels::plan_for(*args, sm_count));
}

int act_bwd_cuda(const ActBwd* args, int sm_count, void* stream) {
  return static_cast<int>(peft_kernels::act_bwd(*args, sm_count, static_cast<cudaStream_t>(stream)));
}

int relu_fwd_cuda(const ReluFwd* args, int sm_count, void* stream) {
  return static_cast<int>(peft_kernels::relu_fwd(*args, sm_count, static_cast<cudaStream_t>(stream)));
}
}
