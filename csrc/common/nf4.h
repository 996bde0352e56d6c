// The 4-bit formats NF4 and FP4 as bitsandbytes stores them: the C++ copy of the levels and thresholds, for host and device
// code alike. peft_kernels/formats/nf4.py says what they are and where they are from; tests hold both to the same bits.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Tables of the two types: level[code]; above bound[i] a value (FP4: a magnitude) is more than the i-th in size.
struct Nf4Tables {
  float level[16];
  float bound[15];
};

constexpr Nf4Tables kNf4 = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {-0.8480964303016663f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f, -0.23460739850997925f,
     -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552542090416f, 0.2035212516784668f,
     0.2920137643814087f, 0.3893125355243683f, 0.5016633868217468f, 0.6427869200706482f, 0.8614783883094788f}};

// Bounds of the seven larger magnitudes; kFp4Codes are the codes in the order of their size. Bit 3 is the sign.
constexpr Nf4Tables kFp4 = {{0.0f, 1.0f / 192, 2.0f / 3, 1.0f, 1.0f / 3, 0.5f, 1.0f / 6, 0.25f, -0.0f, -1.0f / 192, -2.0f / 3,
                             -1.0f, -1.0f / 3, -0.5f, -1.0f / 6, -0.25f},
                            {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f}};
constexpr uint8_t kFp4Codes[8] = {0, 1, 6, 7, 4, 5, 2, 3};

// Blocks of scales that share one in the second level, with double quantisation.
constexpr int kNestedBlock = 256;

// One weight, as every kernel takes it. Element 2i of the flat, row-major tensor is the high half of byte i. The scale of
// block b of `blocksize` (a power of two, 32 to 4096) elements is
//   absmax[b], or with double quantisation nested_code[absmax8[b]] * nested_absmax[b / 256] + *nested_offset,
// a product and a sum, each rounded; an element is level[code] * scale, rounded to fp32 and then to its dtype.
struct Nf4Weight {
  const uint8_t* packed;        // [ceil(numel / 2)]
  const float* absmax;          // [blocks]; null with double quantisation
  const uint8_t* absmax8;       // [blocks]; null without it, as the three below
  const float* nested_absmax;   // [ceil(blocks / 256)]
  const float* nested_code;     // [256]
  const float* nested_offset;   // [1]
  int64_t numel;
  int64_t blocksize;
  bool fp4;
};

}  // namespace peft_kernels
