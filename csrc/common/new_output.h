// The outputs of the CPU's ops.
#pragma once

#include <ATen/ATen.h>

#include "output_memory.h"

namespace peft_kernels {

// at::empty, in huge pages where it is large and its memory new.
inline at::Tensor new_output(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor out = at::empty(shape, options);
  ask_for_huge_pages(out.mutable_data_ptr(), static_cast<int64_t>(out.nbytes()));
  return out;
}

}  // namespace peft_kernels
