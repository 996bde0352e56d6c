// Derivatives of activations on a GPU. csrc/common/activations_cpu.h has the formulas: with a = |z|, each is a tail
// t(a) = act'(-a) and 1 - t(a). An exponential below the smallest normal number is 0; a is cut past where that begins, so
// that tails at infinity are 0 and nothing is infinite times 0. NaN passes. About 20 instructions, two of them in the
// special function unit, where HBM leaves an SM of an H100 57 per element of 16 bits (6 bytes at 3.0 TB/s, 132 SMs).
#pragma once

#include "vec.cuh"

namespace peft_kernels {

// |z|, `most` at most; fminf would lose a NaN.
__device__ __forceinline__ float magnitude(float z, float most) { return fabsf(z) > most ? most : fabsf(z); }

__device__ __forceinline__ float from_tail(float z, float tail) { return z > 0.0f ? 1.0f - tail : tail; }

constexpr float kMinusLog2e = -1.44269504088896341f;

// t of z s(v) from exp(-v) and a v'(a), s the sigmoid.
__device__ __forceinline__ float sigmoid_tail(float e, float slope) {
  const float rest = reciprocal_approx(1.0f + e);
  return e * rest * (1.0f - slope * rest);
}

struct GeluSlope {
  static __device__ __forceinline__ float at(float z) {
    const float a = magnitude(z, 15.0f), e = exp2_approx(a * a * (0.5f * kMinusLog2e));
    // Phi(-a) exp(a^2 / 2) to 0.62 u of itself and a / sqrt(2 pi) together, for a <= 15.3.
    float above = a * 0.0142543531876f + 0.107621518498f, below = a * 0.0357420215109f + 0.269373455901f;
    above = above * a + 0.34109273632f, below = below * a + 0.896195313196f;
    above = above * a + 0.499999981878f, below = below * a + 1.48006740657f;
    below = below * a + 1.0f;
    return from_tail(z, e * (above * reciprocal_approx(below) - a * 0.398942280401432678f));
  }
};

struct SiluSlope {
  static __device__ __forceinline__ float at(float z) {
    const float a = magnitude(z, 112.0f);
    return from_tail(z, sigmoid_tail(exp2_approx(a * kMinusLog2e), a));
  }
};

struct GeluTanhSlope {
  static __device__ __forceinline__ float at(float z) {
    constexpr float kScale = 1.59576912160573071f, kCube = kScale * 0.044715f;  // 2 sqrt(2 / pi)
    const float a = magnitude(z, 11.1f), square = a * a;
    const float e = exp2_approx(a * (square * kCube + kScale) * kMinusLog2e);
    return from_tail(z, sigmoid_tail(e, a * (square * (3 * kCube) + kScale)));
  }
};

}  // namespace peft_kernels
