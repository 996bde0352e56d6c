// The second kernel of the dy pass: adds up the partial sums of all its outputs, in a fixed order.
#pragma once

#include "../common/sm90_ptx.cuh"

namespace lora_dy {

using namespace peft_kernels::sm90;

struct SumJob {
  const float* parts;   // [count, 4 * size]
  void* out;
  long long size;       // in vectors of four
  int count, kind;      // of out: 0 bfloat16, 1 float16, 2 float32
  float scale;
};

constexpr int kSumThreads = 128, kSumJobs = 3, kSumBatch = 8;

struct SumJobs {
  SumJob job[kSumJobs];
  unsigned blocks[kSumJobs];  // those of the jobs before end here
};

__device__ __forceinline__ void store_sum(const SumJob& job, long long at, const float4& v) {
  if (job.kind == 2) {
    static_cast<float4*>(job.out)[at] = v;
  } else if (job.kind == 1) {
    static_cast<uint2*>(job.out)[at] = {pack<__half>(v.x, v.y), pack<__half>(v.z, v.w)};
  } else {
    static_cast<uint2*>(job.out)[at] = {pack<__nv_bfloat16>(v.x, v.y), pack<__nv_bfloat16>(v.z, v.w)};
  }
}

// out = scale * parts.sum(0) for up to three outputs, part after part; a batch of loads is in flight at once.
__global__ void __launch_bounds__(kSumThreads) lora_dy_sum_kernel(const __grid_constant__ SumJobs jobs) {
  wait_for_previous_kernels();
  const int which = blockIdx.x < jobs.blocks[0] ? 0 : blockIdx.x < jobs.blocks[1] ? 1 : 2;
  const SumJob& job = jobs.job[which];
  const unsigned block = blockIdx.x - (which == 0 ? 0 : jobs.blocks[which - 1]);
  const long long at = static_cast<long long>(block) * kSumThreads + threadIdx.x;
  if (at >= job.size) return;
  const float4* parts = reinterpret_cast<const float4*>(job.parts) + at;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int first = 0; first < job.count; first += kSumBatch) {
    float4 v[kSumBatch];
#pragma unroll
    for (int i = 0; i < kSumBatch; ++i) {
      v[i] = first + i < job.count ? __ldcg(parts + (first + i) * job.size) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < kSumBatch; ++i) {
      total.x += v[i].x, total.y += v[i].y, total.z += v[i].z, total.w += v[i].w;
    }
  }
  total.x *= job.scale, total.y *= job.scale, total.z *= job.scale, total.w *= job.scale;
  store_sum(job, at, total);
}

}  // namespace lora_dy
