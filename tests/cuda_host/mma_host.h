// The host's version of csrc/common/mma.cuh: the warp's lanes hand in their fragments, and the last to come multiplies.
// Products of 16-bit numbers are exact; they are added in fp64 and rounded once, where a GPU may round every addition.
#pragma once

#include "simt.h"

namespace peft_kernels {

struct MmaLane {
  float* c;
  const unsigned *a, *b;
};

using HalfOfWord = float (*)(unsigned word, int upper);

inline float bf16_half(unsigned word, int upper) {
  return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(word >> (16 * upper))));
}
inline float f16_half(unsigned word, int upper) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> (16 * upper))));
}

template <HalfOfWord half_of>
void mma_m16n8k16_together(void* const (&lanes)[32], unsigned mask) {
  if (mask != 0xffffffffu) simt::fail("mma by some lanes of the warp (%08x)", mask);
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half_of(own->a[r], i);
      for (int r = 0; r < 2; ++r) b[2 * t + i + r * 8][g] = half_of(own->b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<MmaLane*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      double sum = own->c[r];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      own->c[r] = static_cast<float>(sum);
    }
  }
}

inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              simt::Where where = simt::Where::current()) {
  MmaLane own{c, a, b};
  simt::warp_collective(0xffffffffu, &own, mma_m16n8k16_together<bf16_half>, where);
}

inline void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             simt::Where where = simt::Where::current()) {
  MmaLane own{c, a, b};
  simt::warp_collective(0xffffffffu, &own, mma_m16n8k16_together<f16_half>, where);
}

}  // namespace peft_kernels
