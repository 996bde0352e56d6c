// Weights to 4 bits: the largest magnitude of each block, and a code for every element; and the second level, 8-bit
// codes of the blocks' scales.
//
// Floor: values read, codes and scales written, at HBM's bandwidth: 43 MB for a bf16 [4096, 4096] in blocks of 64, 14
// us at 3.0 TB/s. A lane reads 16 bytes and writes 4 (2 from float32), side by side with its neighbours; the lanes of a
// block of scales find its absmax by shuffles, by way of shared memory where they are more than a warp. In flight: 256
// threads * 3 blocks * 4 loads of 16 bytes = 48 KB per SM. Arithmetic is close to it: about 20 instructions per
// element, two of them lookups in shared memory, of the 22 that an SM of an H100 has while 2.6 bytes of it come and go.
//
// An element is multiplied by the fp32 reciprocal of its block's absmax and compared with the bounds, strictly. What is
// NaN then (0 / 0, or of a block that is not finite) has the code of 0.
#include "nf4_cuda.h"

#include "../common/nf4.cuh"

namespace peft_kernels {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSteps = 4;  // pieces of a thread, all on their way before the first is used
constexpr int kPiecesPerBlock = kThreads * kSteps;  // a multiple of the pieces in a block of scales, 1024 at most
static_assert(kWarps * kSteps == 32, "a warp holds the maxima of all warps and steps");

__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// In the order of their bits magnitudes ascend, and infinity and NaN are above them all.
__device__ __forceinline__ unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The largest over the lanes of a group of `span`, a power of two up to 32. The whole warp calls it.
__device__ __forceinline__ unsigned warp_most(unsigned most, int span) {
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) {
    if (bits >= span) break;
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, bits));
  }
  return most;
}

struct Search {
  float bound[16];
  unsigned most[32];  // of each step's warps
};

// How many of the ascending bounds are below x, four comparisons deep; `tables` has the same bounds as `search`.
__device__ __forceinline__ unsigned nf4_code(float x, const Nf4Tables& tables, const Search& search) {
  const bool upper = x > tables.bound[7], next = x > (upper ? tables.bound[11] : tables.bound[3]);
  int code = (upper ? 8 : 0) + (next ? 4 : 0);
  code += x > search.bound[code + 1] ? 2 : 0;
  code += x > search.bound[code] ? 1 : 0;
  return static_cast<unsigned>(code);
}

// kFp4Codes, four bits each.
constexpr unsigned fp4_codes() {
  unsigned codes = 0;
  for (int i = 0; i < 8; ++i) codes |= static_cast<unsigned>(kFp4Codes[i]) << (4 * i);
  return codes;
}
constexpr unsigned kFp4CodesInAWord = fp4_codes();

__device__ __forceinline__ unsigned fp4_code(float x, const Nf4Tables& tables, const Search& search) {
  const float magnitude = fabsf(x);
  int size = magnitude > tables.bound[3] ? 4 : 0;
  size += magnitude > search.bound[size + 1] ? 2 : 0;
  size += magnitude > search.bound[size] ? 1 : 0;
  return (kFp4CodesInAWord >> (4 * size) & 7) + (x < 0.0f ? 8 : 0);
}

// 16 bytes of elements; zeros for those that the weight lacks.
template <typename T, bool Wide>
__device__ __forceinline__ uint4 load_piece(const T* weight, int64_t piece, int64_t numel) {
  constexpr int N = kWide<T>;
  if (Wide && (piece + 1) * N <= numel) return __ldcs(reinterpret_cast<const uint4*>(weight) + piece);
  float values[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (piece * N + i < numel) values[i] = to_float(__ldg(weight + piece * N + i));
  return pack<T>(values);
}

// The bytes of a piece of N codes; those that the weight lacks are left out, but for the half of a byte.
template <int N, bool Wide>
__device__ __forceinline__ void store_codes(uint8_t* packed, int64_t piece, int64_t numel, unsigned codes) {
  if (Wide && (piece + 1) * N <= numel) {
    if constexpr (N == 8)
      reinterpret_cast<unsigned*>(packed)[piece] = codes;
    else
      reinterpret_cast<unsigned short*>(packed)[piece] = static_cast<unsigned short>(codes);
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    if (piece * N + 2 * i < numel) packed[piece * (N / 2) + i] = static_cast<uint8_t>(codes >> (8 * i));
}

// Wide: weight lies on 16 bytes, packed on the bytes of a piece. 2^shift pieces share a scale.
template <typename T, bool Wide, bool Fp4>
__global__ void __launch_bounds__(kThreads, 3)
    nf4_quantize_kernel(const T* const weight, uint8_t* const packed, float* const absmax, const int64_t numel,
                        const int shift, const Nf4Tables tables) {
  constexpr int N = kWide<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, team = 1 << shift;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPiecesPerBlock + threadIdx.x;
  Search& search = shared<Search>();
  if (threadIdx.x < 15) search.bound[threadIdx.x] = tables.bound[threadIdx.x];
  uint4 raw[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) raw[i] = load_piece<T, Wide>(weight, first + i * kThreads, numel);
  unsigned most[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float values[N];
    unpack<T>(raw[i], values);
    most[i] = magnitude_bits(values[0]);
#pragma unroll
    for (int k = 1; k < N; ++k) most[i] = larger(most[i], magnitude_bits(values[k]));
    most[i] = warp_most(most[i], team);
    if (lane == 0) search.most[i * kWarps + warp] = most[i];
  }
  __syncthreads();
  if (team > 32) {
    const unsigned of_team = warp_most(search.most[lane], team / 32);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) most[i] = __shfl_sync(0xffffffffu, of_team, i * kWarps + warp);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t piece = first + i * kThreads;
    if (piece * N >= numel) continue;
    const float scale = __uint_as_float(most[i]), inverse = __frcp_rn(scale);
    if ((piece & (team - 1)) == 0) absmax[piece >> shift] = scale;
    float values[N];
    unpack<T>(raw[i], values);
    unsigned codes = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float scaled = __fmul_rn(values[k], inverse), x = scaled == scaled ? scaled : 0.0f;
      codes |= (Fp4 ? fp4_code(x, tables, search) : nf4_code(x, tables, search)) << code_shift(k);
    }
    store_codes<N, Wide>(packed, piece, numel, codes);
  }
}

// ---- the second level ----

constexpr int kCodes = 256;

struct ScaleSearch {
  float code[kCodes], bound[kCodes];
  unsigned most[kNestedBlock / 32];
};

// The largest number below x.
__device__ __forceinline__ float next_below(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) == 0) return __uint_as_float(0x80000001u);
  return __uint_as_float((bits & 0x80000000u) != 0 ? bits + 1 : bits - 1);
}

// A block of threads for each nested block. Midway between two codes a value has the even one.
__global__ void __launch_bounds__(kNestedBlock) nf4_quantize_scales_kernel(const Nf4QuantizeScales a) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kNestedBlock + thread;
  ScaleSearch& search = shared<ScaleSearch>();
  search.code[thread] = __ldg(a.nested_code + thread);
  const float centred = block < a.blocks ? __fsub_rn(__ldg(a.absmax + block), __ldg(a.offset)) : 0.0f;
  const unsigned most = warp_most(magnitude_bits(centred), 32);
  if (thread % 32 == 0) search.most[thread / 32] = most;
  __syncthreads();
  if (thread < kCodes - 1) {
    const float middle = __fmul_rn(__fadd_rn(search.code[thread + 1], search.code[thread]), 0.5f);
    search.bound[thread] = thread % 2 == 0 ? middle : next_below(middle);
  }
  __syncthreads();
  const float scale = __uint_as_float(warp_most(search.most[thread % 8], 8));
  const float scaled = __fmul_rn(centred, __frcp_rn(scale));
  int code = 0;  // of a NaN it stays 0: no comparison with it holds
#pragma unroll
  for (int half = kCodes / 2; half > 0; half /= 2) code += scaled > search.bound[code + half - 1] ? half : 0;
  if (block < a.blocks) a.codes[block] = static_cast<uint8_t>(code);
  if (thread == 0) a.nested_absmax[blockIdx.x] = scale;
}

// ---- host ----

template <typename T, bool Wide>
cudaError_t run(const Nf4Quantize& a, cudaStream_t stream) {
  const long long pieces = (a.numel + kWide<T> - 1) / kWide<T>;
  const long long blocks = (pieces + kPiecesPerBlock - 1) / kPiecesPerBlock;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const auto kernel = a.fp4 != 0 ? nf4_quantize_kernel<T, Wide, true> : nf4_quantize_kernel<T, Wide, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, static_cast<const T*>(a.weight),
                a.packed, a.absmax, a.numel, log2_of(a.blocksize / kWide<T>), tables_of(a.fp4 != 0));
}

template <typename T>
cudaError_t run(const Nf4Quantize& a, cudaStream_t stream) {
  const bool wide = on_bytes(a.weight, 16) && on_bytes(a.packed, kWide<T> / 2);
  return wide ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

cudaError_t nf4_quantize(const Nf4Quantize& a, cudaStream_t stream) {
  if (a.numel < 0 || !known_blocksize(a.blocksize) || a.dtype < 0 || a.dtype > 2) return cudaErrorInvalidValue;
  if (a.numel == 0) return cudaSuccess;
  if (a.weight == nullptr || a.packed == nullptr || a.absmax == nullptr) return cudaErrorInvalidValue;
  if (a.dtype == 0) return run<__nv_bfloat16>(a, stream);
  if (a.dtype == 1) return run<__half>(a, stream);
  return run<float>(a, stream);
}

cudaError_t nf4_quantize_scales(const Nf4QuantizeScales& a, cudaStream_t stream) {
  if (a.blocks < 0) return cudaErrorInvalidValue;
  if (a.blocks == 0) return cudaSuccess;
  if (a.absmax == nullptr || a.nested_code == nullptr || a.offset == nullptr) return cudaErrorInvalidValue;
  if (a.codes == nullptr || a.nested_absmax == nullptr) return cudaErrorInvalidValue;
  const long long blocks = (a.blocks + kNestedBlock - 1) / kNestedBlock;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(nf4_quantize_scales_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kNestedBlock), 0, stream, a);
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

int nf4_quantize_cuda(const Nf4Quantize* args, void* stream) {
  return static_cast<int>(peft_kernels::nf4_quantize(*args, static_cast<cudaStream_t>(stream)));
}

int nf4_quantize_scales_cuda(const Nf4QuantizeScales* args, void* stream) {
  return static_cast<int>(peft_kernels::nf4_quantize_scales(*args, static_cast<cudaStream_t>(stream)));
}
}
