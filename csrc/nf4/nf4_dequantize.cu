// 4-bit weights to bfloat16, float16 or float32: level * scale in fp32, rounded once; one launch, double quantisation
// or not.
//
// Floor: codes and scales read, values written, at HBM's bandwidth: with blocks of 64 and double quantisation 42.2 MB
// for a bf16 [4096, 4096], 14 us at 3.0 TB/s. A lane reads 4 bytes (2 for float32) and writes 16, side by side with its
// neighbours: a warp reads one line and writes four. In flight: 256 threads * 4 blocks * 8 loads of 4 bytes = 32 KB per
// SM before the first is used, twice what the latency asks for. Arithmetic: about 5 instructions per element, of the 22
// that an SM of an H100 has while 2.5 bytes of it come and go.
#include "nf4_cuda.h"

#include "../common/nf4.cuh"

namespace peft_kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 8;  // loads of a thread before the first is used
constexpr int kPiecesPerBlock = kThreads * kSteps;

// The codes of piece `piece` of N weights, at the lower end of a word.
template <int N, bool Wide>
__device__ __forceinline__ unsigned load_codes(const uint8_t* packed, int64_t piece) {
  if constexpr (Wide && N == 8) return __ldcs(reinterpret_cast<const unsigned*>(packed) + piece);
  if constexpr (Wide && N == 4) return __ldcs(reinterpret_cast<const unsigned short*>(packed) + piece);
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) codes |= static_cast<unsigned>(__ldg(packed + piece * (N / 2) + i)) << (8 * i);
  return codes;
}

template <typename T, bool Wide>
__device__ __forceinline__ void store_values(T* out, const float (&values)[kWide<T>], bool keep) {
  if constexpr (Wide) {
    const uint4 bits = pack<T>(values);
    if (keep)
      store_16(out, bits);
    else
      __stcs(reinterpret_cast<uint4*>(out), bits);
  } else {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) from_float(values[i], out[i]);
  }
}

// Wide: packed lies on the bytes of a piece, out on 16. A piece lies in one block of scales; `shift` is the blocks'
// log2.
template <typename T, bool Wide, bool Nested>
__global__ void __launch_bounds__(kThreads, Wide ? 4 : 3)
    nf4_dequantize_kernel(const Nf4Weight weight, const Nf4Tables tables, T* const out, const int shift,
                          const bool keep) {
  constexpr int N = kWide<T>;
  const Nf4Levels& levels = shared_levels(tables);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPiecesPerBlock + threadIdx.x, pieces = weight.numel / N;
  unsigned codes[kSteps] = {};
  float scales[kSteps] = {};
  if (pieces > 0) {  // a thread beyond the last piece reads that once more: no branch between loads
    int64_t blocks[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t piece = first + i * kThreads < pieces ? first + i * kThreads : pieces - 1;
      codes[i] = load_codes<N, Wide>(weight.packed, piece);
      blocks[i] = piece * N >> shift;
    }
    block_scales<Nested>(weight, blocks, scales);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (first + i * kThreads >= pieces) continue;
    float values[N];
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = __fmul_rn(levels.of[codes[i] >> code_shift(k) & 15], scales[i]);
    store_values<T, Wide>(out + (first + i * kThreads) * N, values, keep);
  }
  // The last elements, less than a piece of them.
  const int64_t element = pieces * N + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && element < weight.numel) {
    const unsigned byte = __ldg(weight.packed + element / 2);
    const float level = levels.of[byte >> code_shift(static_cast<int>(element % 2)) & 15];
    from_float(__fmul_rn(level, block_scale<Nested>(weight, element >> shift)), out[element]);
  }
}

template <typename T, bool Wide>
cudaError_t run(const Nf4Dequantize& a, cudaStream_t stream) {
  const long long pieces = a.weight.numel / kWide<T>, blocks = (pieces + kPiecesPerBlock - 1) / kPiecesPerBlock;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks > 0 ? blocks : 1));
  const auto kernel =
      a.weight.absmax8 != nullptr ? nf4_dequantize_kernel<T, Wide, true> : nf4_dequantize_kernel<T, Wide, false>;
  return launch(kernel, grid, dim3(kThreads), 0, stream, a.weight, tables_of(a.weight.fp4), static_cast<T*>(a.out),
                log2_of(a.weight.blocksize), a.keep != 0);
}

template <typename T>
cudaError_t run(const Nf4Dequantize& a, cudaStream_t stream) {
  const bool wide = on_bytes(a.weight.packed, kWide<T> / 2) && on_bytes(a.out, 16);
  return wide ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

cudaError_t nf4_dequantize(const Nf4Dequantize& a, cudaStream_t stream) {
  if (a.weight.numel < 0 || !known_blocksize(a.weight.blocksize)) return cudaErrorInvalidValue;
  if (a.dtype < 0 || a.dtype > 2) return cudaErrorInvalidValue;
  if (a.weight.numel == 0) return cudaSuccess;
  if (!complete(a.weight) || a.out == nullptr) return cudaErrorInvalidValue;
  if (a.dtype == 0) return run<__nv_bfloat16>(a, stream);
  if (a.dtype == 1) return run<__half>(a, stream);
  return run<float>(a, stream);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

int nf4_dequantize_cuda(const Nf4Dequantize* args, void* stream) {
  return static_cast<int>(peft_kernels::nf4_dequantize(*args, static_cast<cudaStream_t>(stream)));
}
}
