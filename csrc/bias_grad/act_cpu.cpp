// What an activation needs on a CPU: the pass over its gradient, and ReLU's forward with its bits. This file is compiled once
// per instruction set (PK_ISA).
#include "act.h"

#include <cmath>

#include "act_pass_cpu.h"
#include "relu_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

// ---- float64: dz alone, element by element ----

static double derivative(Activation activation, double z) {
  double level, slope;
  if (activation == Activation::gelu) {
    level = 0.5 * erfc(z * -0.70710678118654752440);
    const double density = exp(-0.5 * z * z) * 0.39894228040143267794;
    slope = density > 0 ? z * density : 0;
  } else {
    const bool silu = activation == Activation::silu;
    constexpr double kScale = 1.59576912160573071176, kCube = 0.044715;  // 2 sqrt(2 / pi)
    const double v = silu ? z : kScale * z * (1 + kCube * z * z), e = exp(-fabs(v)), small = e / (1 + e);
    level = v > 0 ? 1 / (1 + e) : small;  // NaN too
    slope = e > 0 ? z * (small / (1 + e)) * (silu ? 1 : kScale * (1 + 3 * kCube * z * z)) : 0;
  }
  return level + slope;
}

void run_bwd_f64(const ActBwd& f) {
  const auto *dy = static_cast<const double*>(f.dy), *z = static_cast<const double*>(f.kept);
  const auto* mask = static_cast<const uint8_t*>(f.kept);
  auto* dz = static_cast<double*>(f.dz);
#pragma omp parallel for schedule(static) num_threads(f.threads)
  for (int64_t m = 0; m < f.M; ++m)
    for (int64_t n = 0; n < f.N; ++n) {
      const double g = dy[m * f.dy_row + n * f.dy_col];
      if (f.activation == Activation::relu)
        dz[m * f.N + n] = mask[m * f.kept_row + n / 8] >> (n % 8) & 1 ? g : 0;
      else
        dz[m * f.N + n] = g * derivative(f.activation, z[m * f.kept_row + n * f.kept_col]);
    }
}

// ---- which of them ----

template <class T>
void run_bwd_of(const ActBwd& f) {
  switch (f.activation) {
    case Activation::relu: return run_bwd<T, Relu>(f);
    case Activation::gelu: return run_bwd<T, Gelu>(f);
    case Activation::gelu_tanh: return run_bwd<T, GeluTanh>(f);
    case Activation::silu: return run_bwd<T, Silu>(f);
  }
}

void bwd(const ActBwd& f) {
  switch (f.dtype) {
    case Dtype::f32: return run_bwd_of<float>(f);
    case Dtype::bf16: return run_bwd_of<bf16>(f);
    case Dtype::f16: return run_bwd_of<f16>(f);
    case Dtype::f64: return run_bwd_f64(f);
  }
}

void relu_fwd(const ReluFwd& f) {
  switch (f.dtype) {
    case Dtype::f32: return run_relu<float>(f);
    case Dtype::bf16: return run_relu<bf16>(f);
    case Dtype::f16: return run_relu<f16>(f);
    case Dtype::f64: return run_relu_f64(f);
  }
}

}  // namespace

extern const ActKernels act_table;
const ActKernels act_table{bwd, relu_fwd};

}  // namespace PK_ISA
}  // namespace peft_kernels
