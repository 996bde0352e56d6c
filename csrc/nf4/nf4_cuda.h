// C API of quantising to 4 bits and back on a GPU. Any sizes and addresses; wide accesses where those allow them.
// Deterministic; no allocation, no synchronization. dtypes: 0 bfloat16, 1 float16, 2 float32.
#pragma once

#include "../common/nf4.h"

extern "C" {

// Row r of out is the weight's elements from start + r * pitch on. start is a multiple of 8, and for more than one row
// pitch and cols are too.
struct Nf4Dequantize {
  peft_kernels::Nf4Weight weight;
  void* out;  // [rows, cols], dense
  long long start, pitch, rows, cols;
  int dtype;  // of out
  int keep;   // 1: out is read again at once and should stay in L2
};

struct Nf4Quantize {
  const void* weight;  // [numel], dense
  uint8_t* packed;     // [ceil(numel / 2)]
  float* absmax;       // [ceil(numel / blocksize)]; NaN or infinite where the block holds such
  long long numel, blocksize;
  int dtype;  // of weight
  int fp4;
};

struct Nf4QuantizeScales {
  const float* absmax;       // [blocks]
  const float* nested_code;  // [256], ascending
  const float* offset;       // [1], taken from absmax first
  uint8_t* codes;            // [blocks]
  float* nested_absmax;      // [ceil(blocks / 256)]
  long long blocks;
};

// A cudaError_t; stream is a cudaStream_t of the current device.
int nf4_dequantize_cuda(const Nf4Dequantize* args, void* stream);
int nf4_quantize_cuda(const Nf4Quantize* args, void* stream);
int nf4_quantize_scales_cuda(const Nf4QuantizeScales* args, void* stream);
}
