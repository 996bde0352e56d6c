// The end of a row of sums: bias and addend, and the one rounding. Compiled once per instruction set.
#pragma once

#include "../common/results_cpu.h"
#include "nf4_linear.h"

namespace peft_kernels {
namespace PK_ISA {

// out[m, j .. j + live) of J columns = sums + bias + addend, at most a panel or a stripe of 64.
template <class K>
static void nf4_finish(const Nf4Linear& f, typename K::Acc* sums, int64_t m, int64_t j, int64_t live, int64_t J) {
  using Acc = typename K::Acc;
  using Store = typename K::Store;
  if (f.addend.data) {
    Acc added[K::panel > 64 ? K::panel : 64];
    convert(added, static_cast<const Store*>(f.addend.data) + m * f.addend.row + j, live);
    for (int64_t i = 0; i < live; ++i) sums[i] += added[i];
  }
  const Acc* bias = f.bias ? static_cast<const Acc*>(f.bias) + j : nullptr;
  finish_row<K>(sums, 1, bias, static_cast<Store*>(f.out) + m * J + j, live);
}

}  // namespace PK_ISA
}  // namespace peft_kernels
