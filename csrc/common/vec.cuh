// 16-byte loads of rows, and floats from and to the dtypes that kernels take.
#pragma once

#include "device.cuh"

namespace peft_kernels {

// Elements of T that lie in 16 bytes.
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// One rounding, to nearest even.
__device__ __forceinline__ void from_float(float x, float& out) { out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& out) { out = __float2half_rn(x); }

__device__ __forceinline__ void unpack_word(unsigned word, float (&out)[1], float) { out[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack_word(unsigned word, float (&out)[2], __nv_bfloat16) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(unsigned word, float (&out)[2], __half) {
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

// The elements of T in 16 bytes as floats, in the order of their addresses.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&out)[kWide<T>]) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[kWide<T> / 4];
    unpack_word(words[i], values, T{});
#pragma unroll
    for (int k = 0; k < kWide<T> / 4; ++k) out[i * (kWide<T> / 4) + k] = values[k];
  }
}

__device__ __forceinline__ unsigned pack_word(const float* values, float) { return __float_as_uint(values[0]); }
__device__ __forceinline__ unsigned pack_word(const float* values, __nv_bfloat16) {
  const unsigned low = __bfloat16_as_ushort(__float2bfloat16_rn(values[0]));
  return low | static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(values[1]))) << 16;
}
__device__ __forceinline__ unsigned pack_word(const float* values, __half) {
  const unsigned low = __half_as_ushort(__float2half_rn(values[0]));
  return low | static_cast<unsigned>(__half_as_ushort(__float2half_rn(values[1]))) << 16;
}

// What unpack takes apart; each value is rounded once.
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[kWide<T>]) {
  constexpr int kPerWord = kWide<T> / 4;
  return {pack_word(values, T{}), pack_word(values + kPerWord, T{}), pack_word(values + 2 * kPerWord, T{}),
          pack_word(values + 3 * kPerWord, T{})};
}

// One store of 16 bytes. The compiler splits some of *p = bits into four.
__device__ __forceinline__ void store_16(void* p, const uint4& bits) { __stwb(static_cast<uint4*>(p), bits); }

// ---- loaders: what a row pass reads, in `Raw` while the bytes are on their way and as kColumns floats after ----
// A fused pass brings its own: `load` reads every operand at (row, column), `values` makes the terms of the sum and may
// store other results there; it is called once for every row and column that exists. kInFlight, a divisor of 8: rows loaded
// before the first is used. kBlocksPerSm: how many blocks of 256 threads the registers of an SM hold then.

// Rows of unit column stride, each on 16 bytes, the number of columns a multiple of kColumns.
template <typename T>
struct WideRows {
  using Raw = uint4;
  static constexpr int kColumns = kWide<T>, kInFlight = 8, kBlocksPerSm = 3;
  const T* data;
  long long row_stride;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    return __ldg(reinterpret_cast<const uint4*>(data + row * row_stride + column));
  }
  __device__ __forceinline__ void values(const Raw& raw, long long, long long, float (&out)[kColumns]) const {
    unpack<T>(raw, out);
  }
};

// Elements anywhere.
template <typename T>
struct AnyRows {
  using Raw = T;
  static constexpr int kColumns = 1, kInFlight = 8, kBlocksPerSm = 5;
  const T* data;
  long long row_stride, column_stride;

  __device__ __forceinline__ Raw load(long long row, long long column) const {
    return __ldg(data + row * row_stride + column * column_stride);
  }
  __device__ __forceinline__ void values(const Raw& raw, long long, long long, float (&out)[1]) const {
    out[0] = to_float(raw);
  }
};

}  // namespace peft_kernels
