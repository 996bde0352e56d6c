// Quantising to 4 bits and back on a CPU: raw pointers and sizes, no Torch. peft_kernels/formats/nf4_values.py has the maths.
#pragma once

#include <cstdint>

#include "../common/nf4.h"
#include "../common/rows.h"

namespace peft_kernels {

struct Nf4Dequantize {
  Nf4Weight weight;
  Dtype dtype;          // of out; f64 holds the fp32 values
  void* out = nullptr;  // [numel]
  int threads = 1;      // the result does not depend on it, here and below
};

struct Nf4Quantize {
  Dtype dtype;                   // of values: f32, bf16 or f16
  const void* values = nullptr;  // [numel]
  int64_t numel, blocksize;      // numel at least 1
  bool fp4;
  uint8_t* packed = nullptr;  // out [ceil(numel / 2)]; where numel is odd the last half byte is the code of 0
  float* absmax = nullptr;    // out [ceil(numel / blocksize)]; NaN or infinite where the block holds one
  int threads = 1;
};

struct Nf4QuantizeScales {
  const float* absmax = nullptr;  // [blocks]
  int64_t blocks;                 // at least 1
  float offset;
  const float* bound = nullptr;    // [255], ascending: above bound[i] the code is above i
  uint8_t* codes = nullptr;        // out [blocks]
  float* nested_absmax = nullptr;  // out [ceil(blocks / 256)]
  int threads = 1;
};

struct Nf4Kernels {
  void (*dequantize)(const Nf4Dequantize&);
  void (*quantize)(const Nf4Quantize&);
  void (*quantize_scales)(const Nf4QuantizeScales&);
};

// The kernels compiled for the instruction set in use.
const Nf4Kernels& nf4_kernels();

}  // namespace peft_kernels
