// Derivatives of activations as vectors of floats. Compiled once per instruction set.
//
// All three have d(z) + d(-z) = 1, so with a = |z| each is a tail t(a) = d(-a) and 1 - t(a):
//   gelu       t = exp(-a^2 / 2) (m(a) - a / sqrt(2 pi)), m(a) = Phi(-a) exp(a^2 / 2), Mills' ratio over sqrt(2 pi)
//   silu       t = q (1 - a (1 - q)),        q = s(-a)
//   gelu_tanh  t = q (1 - a v'(a) (1 - q)),  q = s(-v(a)), v(a) = 2 sqrt(2 / pi) (a + 0.044715 a^3)
// where s is the sigmoid. No step cancels but the last difference, at the tail's own zero (a near 0.75, 1.28 for silu).
// Exponentials below the smallest normal number become 0, and a is cut where they are: the tails at infinity are 0.
// A NaN passes every step.
#pragma once

#include "simd_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

using Floats = Vec<float>::type;
using Ints = Vec<int32_t>::type;
using Words = Vec<uint32_t>::type;

// a b - fl(a b), exact.
PK_INLINE static Floats product_error(Floats a, Floats b, Floats product) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)product);
#elif defined(__FMA__)
  return (Floats)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)product);
#else
  // Halves of 12 bits, whose products are exact (Dekker).
  const Floats a_high = (Floats)((Words)a & 0xFFFFF000u), b_high = (Floats)((Words)b & 0xFFFFF000u);
  const Floats a_low = a - a_high, b_low = b - b_high;
  return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
}

// exp(-(v + low) / Divisor), Divisor 1 or 2, for v / Divisor in [0, 120] and |low| < 2^-14; exp(-87.3) and less is 0.
template <int Divisor>
PK_INLINE static Floats exp_of_minus(Floats v, Floats low) {
  constexpr float s = -1.0f / Divisor, kRound = 12582912.0f;                        // 1.5 * 2^23: leaves whole numbers
  constexpr float kLn2High = 0.693359375f / s, kLn2Low = -2.12194440054690583e-4f / s;  // n times the first is exact
  const Floats shifted = v * (s * 1.44269504088896341f) + kRound, n = shifted - kRound;
  const Floats r = (v - n * kLn2High) - n * kLn2Low + low;
  // exp(s r) to 0.04 u for |s r| <= log(2) / 2, as a tree: a chain of six waits longer than it computes.
  const Floats r2 = r * r;
  const Floats high = r2 * (s * s * s * s * s * s * 0.00138447580068f) +
                      (r * (s * s * s * s * s * 0.00837420902592f) + s * s * s * s * 0.0416679843443f);
  const Floats middle = r * (s * s * s * 0.166664304888f) + s * s * 0.499999942703f;
  const Floats power = (high * r2 + middle) * r2 + (r * (s * 1.00000003241f) + 1.0f);
  // 2^n: added to the exponent, which then is below zero where the result would not be normal.
  const Ints bits = (Ints)((Words)power + ((Words)shifted << 23));
  return (Floats)(bits > 0 ? bits : Ints{});
}

// |z|, `most` at most; NaN stays.
PK_INLINE static Floats magnitude(Floats z, float most) {
  const Floats a = (Floats)((Words)z & 0x7FFFFFFFu), limit = Floats{} + most;
  return a > limit ? limit : a;
}

// d(z) of t(|z|).
PK_INLINE static Floats from_tail(Floats z, Floats tail) { return z > 0.0f ? 1.0f - tail : tail; }

// `squares_are_exact`: z has so few bits that its square has no rounding error.
template <bool squares_are_exact>
PK_INLINE static Floats gelu_derivative(Floats z) {
  const Floats a = magnitude(z, 15.0f), square = a * a;
  Floats low = -Floats{};  // which no addition sees
  if constexpr (!squares_are_exact) low = product_error(a, a, square);
  const Floats e = exp_of_minus<2>(square, low);
  // m(a) to 0.62 u of m(a) + a / sqrt(2 pi), for a <= 15.3.
  Floats above = a * 0.0142543531876f + 0.107621518498f, below = a * 0.0357420215109f + 0.269373455901f;
  above = above * a + 0.34109273632f, below = below * a + 0.896195313196f;
  above = above * a + 0.499999981878f, below = below * a + 1.48006740657f;
  below = below * a + 1.0f;
  return from_tail(z, e * (above / below - a * 0.398942280401432678f));
}

// t of a x s(v) from exp(-v) and a v'(a).
PK_INLINE static Floats sigmoid_tail(Floats e, Floats slope) {
  const Floats rest = 1.0f / (e + 1.0f);  // 1 - q
  return e * rest * (1.0f - slope * rest);
}

PK_INLINE static Floats silu_derivative(Floats z) {
  const Floats a = magnitude(z, 112.0f);
  return from_tail(z, sigmoid_tail(exp_of_minus<1>(a, -Floats{}), a));
}

// Here v is rounded, so that the tail is wrong by up to 3 u v of itself on top.
PK_INLINE static Floats gelu_tanh_derivative(Floats z) {
  constexpr float kScale = 1.59576912160573071f, kCube = kScale * 0.044715f;  // 2 sqrt(2 / pi)
  const Floats a = magnitude(z, 11.1f), square = a * a;
  const Floats e = exp_of_minus<1>(a * (square * kCube + kScale), -Floats{});
  return from_tail(z, sigmoid_tail(e, a * (square * (3 * kCube) + kScale)));
}

}  // namespace PK_ISA
}  // namespace peft_kernels
