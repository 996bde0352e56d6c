// Who makes the base product on a CPU: the GEMM that starts with the low-rank product (lora_base_cpu.h), or Torch's BLAS.
#pragma once

#include <cstdint>
#include <string>

#include "../common/cpu_isa.h"
#include "../common/rows.h"

namespace peft_kernels {

enum class BaseBy { automatic, blas, fused };

BaseBy base_by();
void set_base_by(const std::string& name);  // "auto", "blas" or "fused"; throws std::invalid_argument for another

// From how many rows on: packing the weight must be repaid. Measured at N = K = 2048 on two cores, weights not in the cache.
// oneDNN reads the weight in place for few rows where the sum runs along its lines (x @ weight.T): it is level at 512 rows, and
// at 64 where the sum runs down them (dy @ weight). MKL is level at 12 in both.
constexpr int64_t kFusedRowsAlong = 512, kFusedRowsDown = 64, kFusedRowsMkl = 12;

// Fused where it was measured to be faster than Torch's BLAS: AVX-512 on AMD (Zen 5), where MKL stays with AVX2 and oneDNN has
// no AMX to use. On Intel, and below AVX-512, nothing is measured: the BLAS.
inline bool fuses_base(Dtype dtype, int64_t M, bool right_by_columns) {
  if (base_by() != BaseBy::automatic) return base_by() == BaseBy::fused && M > 0;
  const bool narrow = dtype == Dtype::bf16;
  if (!is_amd() || active_isa() < (narrow ? Isa::avx512bf16 : Isa::avx512)) return false;
  return M >= (!narrow ? kFusedRowsMkl : right_by_columns ? kFusedRowsAlong : kFusedRowsDown);
}

}  // namespace peft_kernels
