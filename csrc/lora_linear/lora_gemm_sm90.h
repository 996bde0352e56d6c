// C API of the Hopper LoRA GEMM: c = p @ q + alpha * drop(low @ t) + bias.
#pragma once

extern "C" {

struct LoraGemm {
  const void* p;              // [M, K], row pitch ld_p
  const void* q;              // q_transposed: the weight [N, K], q its transpose; else q itself [K, N]; pitch ld_q
  const void* low;            // [M, R], row pitch ld_low
  const void* t;              // q_transposed: [N, R], t its transpose; else t itself, [R, N]. Row pitch ld_t.
  const unsigned char* mask;  // null, or [M, ceil(N / 8)] bits over low @ t, least significant first, 1 = keep
  const void* bias;           // null or [N]
  void* c;                    // [M, N], row pitch ld_c
  float alpha;
  long long M, N, K, R;       // N, K and R multiples of 8; R may be 0
  long long ld_p, ld_q, ld_low, ld_t, ld_c;  // in elements, multiples of 8; every pointer on 16 bytes (the mask: any)
  int dtype;                  // of p, q, low, t and c: 0 bfloat16, 1 float16
  int bias_fp32;              // 0: the bias has that dtype too
  int q_transposed;
};

// Enqueues on the stream (a cudaStream_t). Returns 0 or a cudaError_t.
int lora_gemm_sm90(const LoraGemm* args, void* stream);
}
