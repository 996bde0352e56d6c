// Kernels that show what the shim does: right ones, whose results the tests know, and wrong ones, which it must report.
#include "../../csrc/common/mma.cuh"

namespace peft_kernels {

namespace {

struct Slots {
  int value[1024];
};

// out [4, threads]: the warp's shuffles and ballot.
__global__ void warp_kernel(int* out) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  out[thread] = __shfl_xor_sync(0xffffffffu, thread, 5);
  out[threads + thread] = __shfl_down_sync(0xffffffffu, thread, 3, 16);
  out[2 * threads + thread] = __shfl_sync(0xffffffffu, 10 * thread, 7, 8);
  out[3 * threads + thread] = static_cast<int>(__ballot_sync(0xffffffffu, thread % 3 == 0));
}

// out [grid.y, grid.x, threads]: each thread's value through static and dynamic shared memory, from the thread opposite.
__global__ void block_kernel(int* out) {
  Slots& slots = shared<Slots>();
  int* moved = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), opposite = static_cast<int>(blockDim.x) - 1 - thread;
  const int block = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
  slots.value[thread] = 1000 * block + thread;
  __syncthreads();
  moved[thread] = slots.value[opposite];
  __syncthreads();
  out[block * static_cast<int>(blockDim.x) + thread] = moved[thread];
}

// d [16, 8] = a [16, 16] @ b [16, 8] + c [16, 8], all row-major.
template <bool Half>
__global__ void mma_kernel(const unsigned short* a, const unsigned short* b, const float* c, float* d) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto pair = [](unsigned low, unsigned high) { return low | high << 16; };
  unsigned a_regs[4], b_regs[2];
  float sums[4];
  for (int r = 0; r < 4; ++r) {
    const unsigned short* at = a + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8;
    a_regs[r] = pair(at[0], at[1]);
    sums[r] = c[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
  }
  for (int r = 0; r < 2; ++r) b_regs[r] = pair(b[(2 * t + r * 8) * 8 + g], b[(2 * t + 1 + r * 8) * 8 + g]);
  if (Half)
    mma_m16n8k16_f16(sums, a_regs, b_regs);
  else
    mma_m16n8k16_bf16(sums, a_regs, b_regs);
  for (int r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = sums[r];
}

__global__ void convert_kernel(const float* in, unsigned short* bf16, unsigned short* half, float* back, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  bf16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
  half[i] = __half_as_ushort(__float2half_rn(in[i]));
  back[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
}

enum Fault {
  kTwoBarriers,
  kReturned,
  kShuffleOutsideMask,
  kPartOfWarp,
  kMisaligned,
  kReadPast,
  kWritePast,
  kWriteBefore,
  kSharedPast,
  kDynamicPast,
  kDynamicBefore,
  kUnwritten,
  kNoBarrier,
  kOverflow,
};

// data [64] on 16 bytes.
__global__ void fault_kernel(int fault, float* data) {
  const int thread = static_cast<int>(threadIdx.x);
  Slots& slots = shared<Slots>();
  if (fault == kTwoBarriers) {
    if (thread < 7)
      __syncthreads();
    else
      __syncthreads();
  } else if (fault == kReturned) {
    if (thread == 7) return;
    __syncthreads();
  } else if (fault == kShuffleOutsideMask) {
    if (thread < 16) data[thread] = __shfl_xor_sync(0xffffu, data[thread], 16);
  } else if (fault == kPartOfWarp) {
    if (thread < 16) data[thread] = __shfl_xor_sync(0xffffffffu, data[thread], 1);
  } else if (fault == kMisaligned) {
    if (thread < 15) data[4 * thread] = __uint_as_float(reinterpret_cast<uint4*>(data + 1)[thread].x);
  } else if (fault == kReadPast) {
    data[thread] = __ldg(data + thread + 1);
  } else if (fault == kWritePast) {
    data[thread + 1] = 0;
  } else if (fault == kWriteBefore) {
    data[thread - 1] = 0;
  } else if (fault == kSharedPast) {
    int* values = slots.value;
    values[thread + 1024 - 63] = 0;
  } else if (fault == kDynamicPast) {
    dynamic_shared()[thread + 193] = 0;
  } else if (fault == kDynamicBefore) {
    *(dynamic_shared() - 1) = 0;
  } else if (fault == kUnwritten) {
    data[thread] = __uint_as_float(static_cast<unsigned>(slots.value[thread]));
  } else if (fault == kNoBarrier) {
    slots.value[thread] = thread;
    data[thread] = static_cast<float>(slots.value[thread ^ 1]);
  } else if (fault == kOverflow) {
    data[thread] = static_cast<float>(2147483647 - 10 + thread);
  }
}

}  // namespace

}  // namespace peft_kernels

extern "C" {

int probe_warp(int* out, int threads) {
  return peft_kernels::launch(peft_kernels::warp_kernel, 1, threads, 0, nullptr, out);
}

int probe_block(int* out, int blocks_x, int blocks_y, int threads) {
  const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  return peft_kernels::launch(peft_kernels::block_kernel, grid, threads, static_cast<size_t>(threads) * 4, nullptr, out);
}

int probe_mma(const unsigned short* a, const unsigned short* b, const float* c, float* d, int half, int threads) {
  const auto kernel = half != 0 ? peft_kernels::mma_kernel<true> : peft_kernels::mma_kernel<false>;
  return peft_kernels::launch(kernel, 1, threads, 0, nullptr, a, b, c, d);
}

int probe_convert(const float* in, unsigned short* bf16, unsigned short* half, float* back, int n) {
  return peft_kernels::launch(peft_kernels::convert_kernel, (n + 255) / 256, 256, 0, nullptr, in, bf16, half, back, n);
}

int probe_fault(int fault, float* data) {
  return peft_kernels::launch(peft_kernels::fault_kernel, 1, 64, 256, nullptr, fault, data);
}
}
