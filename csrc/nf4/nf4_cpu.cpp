// Quantising to 4 bits and back on a CPU. This file is compiled once per instruction set (PK_ISA).
//
// Every element is the work of its block alone, so the number of threads changes nothing.
#include "nf4_quantize_cpu.h"

namespace peft_kernels {
namespace PK_ISA {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements at a time: whole blocks of every size, and whole lines

// Threads worth waking for so many elements.
int team_for(int threads, int64_t numel) { return numel < 2 * kChunk ? 1 : threads; }

// run(first, count) for every chunk.
template <class Run>
void in_chunks(int threads, int64_t numel, Run run) {
  const int64_t chunks = ceil_div(numel, kChunk);
#pragma omp parallel for schedule(dynamic, 4) num_threads(team_for(threads, numel))
  for (int64_t i = 0; i < chunks; ++i) run(i * kChunk, min64(kChunk, numel - i * kChunk));
}

template <Way way, class T>
void dequantize_by(const Nf4Dequantize& f) {
  T* out = static_cast<T*>(f.out);
  const int team = team_for(f.threads, f.weight.numel);
  // Each thread one range from end to end: taken in turns, ranges of 256 KB cost a fifth more, as memory goes back and forth.
  const int64_t each = round_up(ceil_div(f.weight.numel, team), kChunk);
#pragma omp parallel for schedule(static, 1) num_threads(team)
  for (int thread = 0; thread < team; ++thread) {
    const int64_t first = thread * each, count = min64(each, f.weight.numel - first);
    if (count > 0) nf4_decode<way>(f.weight, first, count, out + first);
    close(way);
  }
}

template <class T>
void dequantize_as(const Nf4Dequantize& f) {
  const int64_t bytes = f.weight.numel * static_cast<int64_t>(sizeof(T));
  if (goes_past_cache(f.out, 1, bytes / 64 * 64)) return dequantize_by<Way::past, T>(f);
  dequantize_by<Way::cached, T>(f);
}

void dequantize(const Nf4Dequantize& f) {
  switch (f.dtype) {
    case Dtype::f32: return dequantize_as<float>(f);
    case Dtype::bf16: return dequantize_as<bf16>(f);
    case Dtype::f16: return dequantize_as<f16>(f);
    case Dtype::f64: return dequantize_by<Way::cached, double>(f);
  }
}

template <class T>
void quantize_as(const Nf4Quantize& f) {
  const T* values = static_cast<const T*>(f.values);
  in_chunks(f.threads, f.numel, [&](int64_t first, int64_t count) {
    uint8_t* packed = f.packed + first / 2;
    float* absmax = f.absmax + first / f.blocksize;
    if (f.fp4) return quantize_blocks<Fp4Search>(values + first, count, f.blocksize, packed, absmax);
    quantize_blocks<Nf4Search>(values + first, count, f.blocksize, packed, absmax);
  });
}

void quantize(const Nf4Quantize& f) {
  switch (f.dtype) {
    case Dtype::f32: return quantize_as<float>(f);
    case Dtype::bf16: return quantize_as<bf16>(f);
    case Dtype::f16: return quantize_as<f16>(f);
    case Dtype::f64: return;  // refused before
  }
}

void quantize_scales(const Nf4QuantizeScales& f) {
  in_chunks(f.threads, f.blocks, [&](int64_t first, int64_t count) {
    for (int64_t b = first; b < first + count; b += kNestedBlock) {
      const int64_t n = min64(kNestedBlock, first + count - b);
      f.nested_absmax[b / kNestedBlock] = quantize_scale_block(f.absmax + b, n, f.offset, f.bound, f.codes + b);
    }
  });
}

}  // namespace

extern const Nf4Kernels nf4_table = {dequantize, quantize, quantize_scales};

}  // namespace PK_ISA
}  // namespace peft_kernels
