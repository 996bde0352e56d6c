// C API of two skinny passes over x on Hopper: s = drop(x) @ a^T ("down") and da = scaling * g^T @ drop(x).
#pragma once

extern "C" {

struct LoraDown {
  const void* x;          // [M, K], row pitch ld_x
  const void* a;          // [R, K], row pitch ld_a
  const long long* seed;  // null: no dropout. Else one int64 on the device: draws the mask, writes it and applies it
  void* s;                // [M, R], contiguous
  unsigned char* mask;    // with a seed: [M, K / 8], bit j of byte b is column 8 b + j, 1 = keep; any alignment
  long long M, K, R;      // K and R multiples of 8, 8 <= R <= 128
  long long ld_x, ld_a;   // in elements, multiples of 8. x and a on 16 bytes, s on 8
  unsigned threshold;     // 1 .. 65536: how many of 65536 levels drop an element
  int dtype;              // of x, a and s: 0 bfloat16, 1 float16
};

struct LoraDa {
  const void* x;              // [M, K], row pitch ld_x
  const void* g;              // [M, R], contiguous
  const unsigned char* mask;  // null, or [M, K / 8] as above, read: K a multiple of 128, on 16 bytes
  void* da;                   // [R, K], contiguous; on 16 bytes
  float scaling;
  long long M, K, R, ld_x;    // as above
  int dtype;                  // of x and g, and of da unless da_fp32
  int da_fp32;
};

// Enqueue on the stream (a cudaStream_t). Return 0 or a cudaError_t. Neither allocates nor waits; the parts of a
// sum meet in shared memory inside a cluster.
int lora_down_sm90(const LoraDown* args, int sm_count, void* stream);
int lora_da_sm90(const LoraDa* args, int sm_count, void* stream);
}
