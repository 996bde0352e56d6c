// In front of a binding that runs on a CPU: its kernels are registered for the CPU, in a namespace of the test.
#pragma once

#include <torch/library.h>

#define CUDA_HOST_IMPL(ns, m) _TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
#define CUDA_HOST_FRAGMENT(ns, m) _TORCH_LIBRARY_FRAGMENT(ns, m, C10_UID)
#undef TORCH_LIBRARY_IMPL
#undef TORCH_LIBRARY_FRAGMENT
#define TORCH_LIBRARY_IMPL(ns, key, m) CUDA_HOST_IMPL(CUDA_HOST_NAMESPACE, m)
#define TORCH_LIBRARY_FRAGMENT(ns, m) CUDA_HOST_FRAGMENT(CUDA_HOST_NAMESPACE, m)
