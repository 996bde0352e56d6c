// What the norm's forward and backward kernels share: rows in 16-byte pieces, columns of a dtype known at run time, and
// how threads lie on rows.
//
// A row belongs to a team: `span` threads side by side, within a warp where the row is short, else a whole block.
// Thread `lane` of a team holds the 16-byte pieces lane, lane + span, ... of its row.
#pragma once

#include "../common/column_sum_launch.cuh"
#include "../common/reduce.cuh"

namespace peft_kernels {

constexpr int kBFloat16 = 0, kHalf = 1, kFloat32 = 2;
constexpr int kMostThreads = 512;
constexpr long long kMostColumns = 1ll << 22;  // of a row: its tiles are a grid's second dimension

// One load of up to 16 bytes. ReadOnly: nothing in the kernel writes there.
template <bool ReadOnly, typename V>
__device__ __forceinline__ V load(const V* p) {
  if constexpr (ReadOnly) return __ldg(p);
  return *p;
}

// 16 bytes of a row that begins at element `first`, and that nothing else reads.
template <typename T>
__device__ __forceinline__ uint4 load_piece(const void* data, long long first, long long piece) {
  return __ldcs(reinterpret_cast<const uint4*>(static_cast<const T*>(data) + first) + piece);
}

// N elements on their size in bytes (on 16 where that is more), as floats.
template <bool ReadOnly, int N, typename T>
__device__ __forceinline__ void load_columns(const T* p, float (&out)[N]) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kWords = N / kPerWord;
  unsigned words[kWords];
  if constexpr (kWords == 2) {
    const uint2 bits = load<ReadOnly>(reinterpret_cast<const uint2*>(p));
    words[0] = bits.x, words[1] = bits.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 bits = load<ReadOnly>(reinterpret_cast<const uint4*>(p) + i / 4);
      words[i] = bits.x, words[i + 1] = bits.y, words[i + 2] = bits.z, words[i + 3] = bits.w;
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    float values[kPerWord];
    unpack_word(words[i], values, T{});
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) out[i * kPerWord + k] = values[k];
  }
}

// The same for a dtype that is known at run time, from element `at` on.
template <bool ReadOnly, int N>
__device__ __forceinline__ void load_columns(const void* data, int dtype, long long at, float (&out)[N]) {
  if (dtype == kFloat32) return load_columns<ReadOnly>(static_cast<const float*>(data) + at, out);
  if (dtype == kHalf) return load_columns<ReadOnly>(static_cast<const __half*>(data) + at, out);
  load_columns<ReadOnly>(static_cast<const __nv_bfloat16*>(data) + at, out);
}

// Elements `at` and on of an affine parameter, or the same number for all where there is none.
template <int N>
__device__ __forceinline__ void load_parameter(const void* data, int dtype, long long at, float otherwise,
                                               float (&out)[N]) {
  if (data != nullptr) return load_columns<true>(data, dtype, at, out);
#pragma unroll
  for (int c = 0; c < N; ++c) out[c] = otherwise;
}

template <int N, typename T>
__device__ __forceinline__ void store_columns(T* p, const float (&values)[N]) {
#pragma unroll
  for (int begin = 0; begin < N; begin += kWide<T>) {
    float piece[kWide<T>];
#pragma unroll
    for (int c = 0; c < kWide<T>; ++c) piece[c] = values[begin + c];
    store_16(p + begin, pack<T>(piece));
  }
}
template <int N>
__device__ __forceinline__ void store_columns(void* data, int dtype, long long at, const float (&values)[N]) {
  if (dtype == kFloat32) return store_columns(static_cast<float*>(data) + at, values);
  if constexpr (N == kWide<__half>) {
    if (dtype == kHalf) return store_columns(static_cast<__half*>(data) + at, values);
    store_columns(static_cast<__nv_bfloat16*>(data) + at, values);
  }
}

// `value` as the dtype holds it.
template <typename T>
__device__ __forceinline__ float rounded(float value) {
  T held;
  from_float(value, held);
  return to_float(held);
}
__device__ __forceinline__ float rounded(float value, int dtype) {
  return dtype == kFloat32 ? value : dtype == kHalf ? rounded<__half>(value) : rounded<__nv_bfloat16>(value);
}

// ---- host ----

// How a block's threads lie on rows.
struct Teams {
  int span, threads;

  int count() const { return threads / span; }
};

// For rows of `pieces`, up to kMostThreads * held, of which a thread holds `held`: `threads` for short rows, whose
// teams lie within a warp and read 64 bytes side by side where the row has as many.
inline Teams teams_for(long long pieces, int held, int threads) {
  const long long needed = ceil_div(pieces, held);
  if (needed > 32) return {static_cast<int>(ceil_div(needed, 32) * 32), static_cast<int>(ceil_div(needed, 32) * 32)};
  int span = 1;
  while (span < needed || (span < 4 && span < pieces)) span *= 2;
  return {span, threads};
}

inline int columns_per_piece(int dtype) { return dtype == kFloat32 ? 4 : 8; }
inline bool known(int dtype) { return dtype == kBFloat16 || dtype == kHalf || dtype == kFloat32; }
inline bool lies_on(const void* p, int bytes) { return reinterpret_cast<unsigned long long>(p) % bytes == 0; }

// Whether rows of pieces of `columns` can be read by 16-byte loads.
inline bool rows_lie_well(const void* p, long long row_stride, long long M, int columns) {
  return lies_on(p, 16) && row_stride >= 0 && (row_stride % columns == 0 || M <= 1);
}

// Whether pieces of `columns` of an affine parameter can be read by one load or two.
inline bool parameter_lies_well(const void* p, int dtype, int columns) {
  if (p == nullptr) return true;
  return known(dtype) && lies_on(p, columns == 4 && dtype != kFloat32 ? 8 : 16);
}

}  // namespace peft_kernels
