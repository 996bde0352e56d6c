// What the kernels of the 4-bit linear share: scales that are loaded ahead, x on its way to shared memory, and what is
// done with a finished sum.
#pragma once

#include "../common/nf4.cuh"
#include "nf4_linear_cuda.h"

namespace peft_kernels {

// A block's scale as it lies in memory: with double quantisation its two parts, put together only when it is used, so
// that no load waits for another.
struct RawScale {
  float value;  // absmax, or the nested one
  unsigned code;
};

__device__ __forceinline__ RawScale load_scale(const Nf4Weight& weight, int64_t block) {
  const bool nested = weight.absmax8 != nullptr;
  const float* value = nested ? weight.nested_absmax + block / kNestedBlock : weight.absmax + block;
  unsigned code = 0;
  if (nested) code = __ldg(weight.absmax8 + block);
  return {__ldg(value), code};
}

// What turns raw scales into numbers. A barrier must follow before it is used.
struct ScaleTable {
  struct Codes {
    float of[256];
  };
  const Codes& codes;
  float offset;
  bool nested;

  __device__ __forceinline__ explicit ScaleTable(const Nf4Weight& weight)
      : codes(filled(weight)), nested(weight.absmax8 != nullptr) {
    offset = nested ? __ldg(weight.nested_offset) : 0.0f;
  }
  __device__ __forceinline__ static const Codes& filled(const Nf4Weight& weight) {
    Codes& codes = shared<Codes>();
    if (weight.absmax8 != nullptr)
      for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x))
        codes.of[i] = __ldg(weight.nested_code + i);
    return codes;
  }
  __device__ __forceinline__ float scale(const RawScale& raw) const {
    return nested ? __fadd_rn(__fmul_rn(codes.of[raw.code], raw.value), offset) : raw.value;
  }
};

__device__ __forceinline__ float load_as_float(const void* data, int dtype, int64_t at) {
  if (dtype == 2) return __ldg(static_cast<const float*>(data) + at);
  if (dtype == 1) return to_float(__ldg(static_cast<const __half*>(data) + at));
  return to_float(__ldg(static_cast<const __nv_bfloat16*>(data) + at));
}

// y[m, n] = sum + bias + addend.
template <typename T>
__device__ __forceinline__ void finish(const Nf4Linear& a, int64_t m, int64_t n, float sum) {
  if (a.bias != nullptr) sum = __fadd_rn(sum, load_as_float(a.bias, a.bias_dtype, n * a.bias_step));
  if (a.addend != nullptr)
    sum = __fadd_rn(sum, to_float(__ldg(static_cast<const T*>(a.addend) + m * a.addend_row + n * a.addend_column)));
  from_float(sum, static_cast<T*>(a.y)[m * a.N + n]);
}

// 16 bytes of row m of x from column k on; zeros past the ends. Wide: they lie on 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 load_x(const Nf4Linear& a, bool wide, int64_t m, int64_t k) {
  if (m >= a.M || k >= a.K) return {0, 0, 0, 0};
  const T* x = static_cast<const T*>(a.x) + m * a.x_row + k * a.x_column;
  if (wide) return __ldg(reinterpret_cast<const uint4*>(x));
  float values[kWide<T>];
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) values[i] = to_float(__ldg(x + i * a.x_column));
  return pack<T>(values);
}

// ---- host ----

// Whether rows of x can be read by 16-byte loads; K is a multiple of 32.
inline bool wide_x(const Nf4Linear& a, int elements) {
  return on_bytes(a.x, 16) && a.x_column == 1 && (a.x_row % elements == 0 || a.M == 1);
}

__host__ __device__ inline long long ceil_div(long long a, long long b) { return a / b + (a % b != 0); }

}  // namespace peft_kernels
