// What every kernel over 4-bit weights shares: levels and scales on the device, and the checks of a call.
#pragma once

#include "nf4.h"
#include "vec.cuh"

namespace peft_kernels {

// A type's levels by code. In shared memory each has a bank of its own: lookups of a warp never wait for one another.
struct Nf4Levels {
  float of[16];
};

// A barrier must follow before they are read.
__device__ __forceinline__ Nf4Levels& shared_levels(const Nf4Tables& tables) {
  Nf4Levels& levels = shared<Nf4Levels>();
  if (threadIdx.x < 16) levels.of[threadIdx.x] = tables.level[threadIdx.x];
  return levels;
}

// Where in a little-endian word of packed codes element `i` of it begins: element 2i is the high half of byte i.
__host__ __device__ constexpr int code_shift(int i) { return i / 2 * 8 + (i % 2 == 0 ? 4 : 0); }

// The scales of some blocks; all loads that do not wait for another come first. Nested: the weight has double
// quantisation.
template <bool Nested, int Count>
__device__ __forceinline__ void block_scales(const Nf4Weight& weight, const int64_t (&blocks)[Count],
                                             float (&out)[Count]) {
  if constexpr (!Nested) {
#pragma unroll
    for (int i = 0; i < Count; ++i) out[i] = __ldg(weight.absmax + blocks[i]);
  } else {
    uint8_t codes[Count];
    float shared_scales[Count];
    const float offset = __ldg(weight.nested_offset);
#pragma unroll
    for (int i = 0; i < Count; ++i) codes[i] = __ldg(weight.absmax8 + blocks[i]);
#pragma unroll
    for (int i = 0; i < Count; ++i) shared_scales[i] = __ldg(weight.nested_absmax + blocks[i] / kNestedBlock);
#pragma unroll
    for (int i = 0; i < Count; ++i) out[i] = __ldg(weight.nested_code + codes[i]);
#pragma unroll
    for (int i = 0; i < Count; ++i) out[i] = __fadd_rn(__fmul_rn(out[i], shared_scales[i]), offset);
  }
}

template <bool Nested>
__device__ __forceinline__ float block_scale(const Nf4Weight& weight, int64_t block) {
  float scale[1];
  block_scales<Nested>(weight, {block}, scale);
  return scale[0];
}

// ---- host ----

inline const Nf4Tables& tables_of(bool fp4) { return fp4 ? kFp4 : kNf4; }

inline bool known_blocksize(int64_t blocksize) {
  return blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0;
}

// Of a power of two.
inline int log2_of(int64_t n) {
  int bits = 0;
  while (n >> (bits + 1) != 0) ++bits;
  return bits;
}

// Whether a weight that is not empty has all that its kind needs.
inline bool complete(const Nf4Weight& weight) {
  if (weight.packed == nullptr) return false;
  if (weight.absmax8 == nullptr) return weight.absmax != nullptr;
  return weight.nested_absmax != nullptr && weight.nested_code != nullptr && weight.nested_offset != nullptr;
}

inline bool on_bytes(const void* p, int bytes) { return reinterpret_cast<unsigned long long>(p) % bytes == 0; }

}  // namespace peft_kernels
