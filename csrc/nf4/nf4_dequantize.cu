// 4-bit weights, or some rows or columns of one, to bfloat16, float16 or float32: level * scale in fp32, rounded once; one
// launch, double quantisation or not.
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
constexpr int kLogWarp = 5, kLogThreads = 8;
static_assert(1 << kLogThreads == kThreads);

// What is written, in pieces of N weights: 1 << log_width threads lie side by side in a row, the others in rows below. A
// contiguous stretch is a column of pieces.
struct Pieces {
  int64_t first, pitch;        // in the weight
  int64_t rows, per_row;       // of out; a row begins per_row pieces behind the one above
  int log_width;
  int tail;                    // elements behind the last piece, of one row alone
};

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
    nf4_dequantize_kernel(const Nf4Weight weight, const Nf4Tables tables, T* const out, const Pieces pieces,
                          const int shift, const bool keep) {
  constexpr int N = kWide<T>;
  const Nf4Levels& levels = shared_levels(tables);
  const int lane = static_cast<int>(threadIdx.x) & ((1 << pieces.log_width) - 1);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) << pieces.log_width) + lane;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kPiecesPerBlock + threadIdx.x) >> pieces.log_width;
  const int64_t apart = kThreads >> pieces.log_width, rows = column < pieces.per_row ? pieces.rows : 0;
  const int64_t first = pieces.first + row * pieces.pitch + column;
  unsigned codes[kSteps] = {};
  float scales[kSteps] = {};
  if (pieces.rows > 0) {  // a thread beyond the last piece reads the first once more: no branch between loads
    int64_t blocks[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t piece = row + i * apart < rows ? first + i * (apart * pieces.pitch) : pieces.first;
      codes[i] = load_codes<N, Wide>(weight.packed, piece);
      blocks[i] = piece * N >> shift;
    }
    block_scales<Nested>(weight, blocks, scales);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (row + i * apart >= rows) continue;
    float values[N];
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = __fmul_rn(levels.of[codes[i] >> code_shift(k) & 15], scales[i]);
    store_values<T, Wide>(out + ((row + i * apart) * pieces.per_row + column) * N, values, keep);
  }
  // The last elements, less than a piece of them.
  if (blockIdx.x == gridDim.x - 1 && static_cast<int>(threadIdx.x) < pieces.tail) {
    const int64_t at = pieces.rows * N + threadIdx.x, element = pieces.first * N + at;
    const unsigned byte = __ldg(weight.packed + element / 2);
    const float level = levels.of[byte >> code_shift(static_cast<int>(element % 2)) & 15];
    from_float(__fmul_rn(level, block_scale<Nested>(weight, element >> shift)), out[at]);
  }
}

Pieces pieces_of(const Nf4Dequantize& a, int elements) {
  if (a.rows == 1) return {a.start / elements, 1, a.cols / elements, 1, 0, static_cast<int>(a.cols % elements)};
  const long long per_row = a.cols / elements;
  int log_width = kLogWarp;  // a warp in one row at least, though not all of it may find something there
  while (log_width < kLogThreads && per_row % (2ll << log_width) == 0) ++log_width;
  return {a.start / elements, a.pitch / elements, a.rows, per_row, log_width, 0};
}

template <typename T, bool Wide>
cudaError_t run(const Nf4Dequantize& a, cudaStream_t stream) {
  const Pieces pieces = pieces_of(a, kWide<T>);
  const long long tall = kPiecesPerBlock >> pieces.log_width, wide = 1ll << pieces.log_width;
  const long long down = (pieces.rows + tall - 1) / tall, across = (pieces.per_row + wide - 1) / wide;
  if (down > 0x7fffffff || across > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(down > 0 ? down : 1), static_cast<unsigned>(across));
  const auto kernel =
      a.weight.absmax8 != nullptr ? nf4_dequantize_kernel<T, Wide, true> : nf4_dequantize_kernel<T, Wide, false>;
  return launch(kernel, grid, dim3(kThreads), 0, stream, a.weight, tables_of(a.weight.fp4), static_cast<T*>(a.out),
                pieces, log2_of(a.weight.blocksize), a.keep != 0);
}

template <typename T>
cudaError_t run(const Nf4Dequantize& a, cudaStream_t stream) {
  const bool wide = on_bytes(a.weight.packed, kWide<T> / 2) && on_bytes(a.out, 16);
  return wide ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

// Whether the part lies in the weight, and no piece of it in two blocks of scales.
bool fits(const Nf4Dequantize& a) {
  if (a.start < 0 || a.rows < 0 || a.cols < 0 || a.pitch < 0 || a.start % 8 != 0) return false;
  if (a.rows > 1 && (a.pitch % 8 != 0 || a.cols % 8 != 0)) return false;
  return a.rows == 0 || a.start + (a.rows - 1) * a.pitch + a.cols <= a.weight.numel;
}

cudaError_t nf4_dequantize(const Nf4Dequantize& a, cudaStream_t stream) {
  if (!fits(a) || !known_blocksize(a.weight.blocksize)) return cudaErrorInvalidValue;
  if (a.dtype < 0 || a.dtype > 2) return cudaErrorInvalidValue;
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
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
