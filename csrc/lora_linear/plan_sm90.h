// Which GEMM adds the base product on Hopper: ours, which starts with the low-rank product, or cuBLAS with beta = 1.
#pragma once

#include <algorithm>
#include <cstdint>

namespace peft_kernels {

// Measured on an H100 SXM: both GEMMs at 680 to 710 TFLOP/s on full waves of tiles, copies at 3.0 TB/s.
constexpr double kFlops = 7.0e14, kBandwidth = 3.0e12, kLaunchSeconds = 3e-6;
constexpr double kCublasPartialWaves = 1.05;  // it has smaller tiles and split-K: 25.4 us where whole waves would take 24.2
constexpr int64_t kGemmTileM = 128, kGemmTileN = 256;

// Ours computes whole waves of 128 x 256 tiles; cuBLAS fits any shape, but the low-rank product is written out first.
inline bool starts_with_low_rank(int64_t M, int64_t N, int64_t K, int64_t R, int64_t sms) {
  const int64_t tiles = (M + kGemmTileM - 1) / kGemmTileM * ((N + kGemmTileN - 1) / kGemmTileN);
  const int64_t waves = (tiles + sms - 1) / sms;
  const double ours = 2.0 * kGemmTileM * kGemmTileN * (K + R) * waves * sms / kFlops;
  const double written = 2.0 * M * N / kBandwidth;
  return ours <= kCublasPartialWaves * 2.0 * M * N * K / kFlops + written + kLaunchSeconds;
}

}  // namespace peft_kernels
