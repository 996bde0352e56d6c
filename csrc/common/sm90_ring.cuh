// A position in a ring of stages that a producer fills and consumers empty, each with a pair of mbarriers.
#pragma once

#include <cstdint>

namespace peft_kernels::sm90 {

template <int STAGES>
struct Ring {
  uint32_t stage, parity = 0;  // the parity flips with each lap

  __device__ __forceinline__ explicit Ring(uint32_t first = 0) : stage(first) {}
  __device__ __forceinline__ uint32_t previous() const { return (stage + STAGES - 1) % STAGES; }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void advance(uint32_t count) {  // at most STAGES
    stage += count;
    if (stage >= STAGES) {
      stage -= STAGES;
      parity ^= 1;
    }
  }
};

}  // namespace peft_kernels::sm90
