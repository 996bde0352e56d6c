// The extension module _C_cuda: loading it registers the CUDA kernels; build_info says how it was built.
#include <pybind11/pybind11.h>

#include "lora_linear/hopper.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of peft_kernels";
  m.def("enable_hopper", &peft_kernels::enable_hopper, py::arg("enabled"),
        "Whether lora_linear's Hopper kernels take the calls that they can; off, every call goes to the general ones.");
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = PEFT_KERNELS_TORCH_VERSION;
    info["compiler"] = PEFT_KERNELS_COMPILER;
    info["cuda"] = PEFT_KERNELS_CUDA_COMPILER;
    info["archs"] = PEFT_KERNELS_CUDA_ARCHS;
    return info;
  });
}
