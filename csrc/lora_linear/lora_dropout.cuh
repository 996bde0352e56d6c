// The packed dropout mask on the GPU: Philox4x32-7 in registers, and bits applied to mma fragments.
#pragma once

#include "../common/sm90_ptx.cuh"

namespace lora_passes {

using namespace peft_kernels::sm90;

struct Dropout {
  const long long* seed;
  unsigned char* mask;
  uint32_t limit;    // (threshold << 16) - 1: a 16-bit lane in the high half of a word keeps if the word exceeds it
  int row_bytes;     // K / 8
  bool wide_stores;  // rows of the mask start on 8 bytes
};

struct Key {
  uint32_t low, high;
};

__device__ __forceinline__ Key load_key(const long long* seed) {
  const unsigned long long value = static_cast<unsigned long long>(*seed);
  return {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)};
}

// Mask bits of eight neighbours, in the lowest byte: csrc/common/philox.h's mask_byte. A bit is set where its 16-bit
// lane >= threshold; the lanes are the low halves of the four words, then their high halves.
__device__ __forceinline__ uint32_t draw_byte(Key key, uint64_t counter, uint32_t limit) {
  constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u, kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    uint32_t high0, low0, high1 = 0, low1 = 0;
    multiply_wide(high0, low0, c[0], kM0);
    if (round > 0) multiply_wide(high1, low1, c[2], kM1);  // c[2] starts as 0
    c[0] = high1 ^ c[1] ^ key.low;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key.high;
    c[3] = low0;
    key.low += kW0;
    key.high += kW1;
  }
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if ((c[j] << 16) > limit) bits |= 1u << j;  // with threshold 65536 the limit is all ones: nothing exceeds it
    if (c[j] > limit) bits |= 1u << (j + 4);
  }
  return bits;
}

// Eight bytes at `counter` and on: columns of one row.
__device__ __forceinline__ void draw_8_bytes(uint32_t (&words)[2], const Key& key, uint64_t counter, uint32_t limit) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    words[i] = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) words[i] |= draw_byte(key, counter + 4 * i + b, limit) << (8 * b);
  }
}

// Writes the bytes that lie inside the row.
__device__ __forceinline__ void store_8_bytes(const Dropout& dropout, int row, int byte, const uint32_t (&words)[2]) {
  unsigned char* target = dropout.mask + static_cast<int64_t>(row) * dropout.row_bytes + byte;
  if (dropout.wide_stores && byte + 8 <= dropout.row_bytes) {
    *reinterpret_cast<uint2*>(target) = uint2{words[0], words[1]};
    return;
  }
  for (int i = 0; i < 8 && byte + i < dropout.row_bytes; ++i) {
    target[i] = static_cast<unsigned char>((i < 4 ? words[0] : words[1]) >> (8 * (i % 4)));
  }
}

// The mask of a 16 x 128 tile for its A fragments, shifted so that a lane's two bits of each byte are at the top of
// the byte. Lane l's rows are l / 4 and that + 8, its columns 2 (l % 4) and the next of every eight.
struct TileMask {
  uint32_t even[2][4], odd[2][4];  // [row half][word of 32 columns]

  // Each lane draws eight bytes, and the four that share two rows exchange them. For row0 + 16 rows and byte0 + 16
  // bytes; also writes what lies inside [M, row_bytes].
  __device__ __forceinline__ void draw(const Dropout& dropout, const Key& key, int row0, int byte0, int M, int lane) {
    const int row = row0 + lane / 4 + 8 * (lane % 2);
    const int byte = byte0 + 8 * (lane % 4 / 2);
    uint32_t drawn[2];
    draw_8_bytes(drawn, key, static_cast<uint64_t>(row) * dropout.row_bytes + byte, dropout.limit);
    if (row < M) store_8_bytes(dropout, row, byte, drawn);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t word = __shfl_sync(~0u, drawn[w % 2], lane / 4 * 4 + half + 2 * (w / 2));
        even[half][w] = word << (7 - 2 * (lane % 4));
        odd[half][w] = word << (6 - 2 * (lane % 4));
      }
    }
  }

  // Zeros what is dropped of the A fragment of columns 16 STEP and on.
  template <int STEP>
  __device__ __forceinline__ void apply(uint32_t (&a)[4]) const {
    constexpr int kWord = STEP / 2, kByte = STEP % 2 * 2;
    a[0] &= spread_signs<kByte>(even[0][kWord], odd[0][kWord]);
    a[1] &= spread_signs<kByte>(even[1][kWord], odd[1][kWord]);
    a[2] &= spread_signs<kByte + 1>(even[0][kWord], odd[0][kWord]);
    a[3] &= spread_signs<kByte + 1>(even[1][kWord], odd[1][kWord]);
  }
};

}  // namespace lora_passes
