// Philox4x32-7 (Salmon et al. 2011): the constants and one scalar call, shared by every dropout mask.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PEFT_KERNELS_HD __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set compiles its own copy, and the linker must not merge them.
#define PEFT_KERNELS_HD static inline
#endif

namespace peft_kernels {
namespace philox {

constexpr int kRounds = 7;
constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
constexpr uint32_t kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;

// Eight mask bits for columns 8 b .. 8 b + 7 of a row: bit j is set when its 16-bit lane is >= threshold. The lanes
// are the low halves of the four words, then their high halves. counter is m * ceil(K / 8) + b.
PEFT_KERNELS_HD uint8_t mask_byte(uint64_t seed, uint64_t counter, uint32_t threshold) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kM0) * c[0], p1 = static_cast<uint64_t>(kM1) * c[2];
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = c0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = c2;
    c[3] = static_cast<uint32_t>(p0);
    k0 += kW0;
    k1 += kW1;
  }
  uint32_t bits = 0;
  for (int j = 0; j < 4; ++j) {
    bits |= static_cast<uint32_t>((c[j] & 0xFFFFu) >= threshold) << j;
    bits |= static_cast<uint32_t>((c[j] >> 16) >= threshold) << (j + 4);
  }
  return static_cast<uint8_t>(bits);
}

}  // namespace philox
}  // namespace peft_kernels
