// Rows of results, rounded once into memory. Compiled once per instruction set.
#pragma once

#include "blocks_cpu.h"
#include "rows.h"

namespace peft_kernels {
namespace PK_ISA {

// One row of n results, at most a panel: out = row * scale + bias, rounded once.
template <class K>
static inline void finish_row(typename K::Acc* row, typename K::Acc scale, const typename K::Acc* bias, typename K::Store* out,
                              int64_t n) {
  const auto finish = [&](int64_t count) {
    if (bias)
      for (int64_t j = 0; j < count; ++j) row[j] = row[j] * scale + bias[j];
    else
      for (int64_t j = 0; j < count; ++j) row[j] *= scale;
    convert(out, row, count);
  };
  if (n == K::panel)
    finish(K::panel);  // a constant for the compiler
  else
    finish(n);
}

template <class Acc>
static void write_as(Dtype dtype, void* out, int64_t at, const Acc* row, int64_t n) {
  if constexpr (sizeof(Acc) == 8) {
    float narrow[256];
    if (dtype == Dtype::f64) return convert(static_cast<double*>(out) + at, row, n);
    for (int64_t j = 0; j < n; j += 256) {
      const int64_t live = min64(256, n - j);
      for (int64_t i = 0; i < live; ++i) narrow[i] = static_cast<float>(row[j + i]);
      write_as(dtype, out, at + j, narrow, live);
    }
  } else {
    switch (dtype) {
      case Dtype::f32: return convert(static_cast<float*>(out) + at, row, n);
      case Dtype::bf16: return convert(static_cast<bf16*>(out) + at, row, n);
      case Dtype::f16: return convert(static_cast<f16*>(out) + at, row, n);
      case Dtype::f64:
        for (int64_t i = 0; i < n; ++i) static_cast<double*>(out)[at + i] = row[i];
    }
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
