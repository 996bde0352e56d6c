// The extension module _C_cpu: loading it registers the CPU kernels; its functions say how it was built and what it uses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/output_memory.h"
#include "lora_linear/plan_cpu.h"

namespace py = pybind11;
namespace pk = peft_kernels;

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() = "CPU kernels of peft_kernels";
  m.def("isa", [] { return pk::isa_name(pk::active_isa()); }, "Name of the instruction set in use.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (pk::Isa isa : pk::available_isas()) names.push_back(pk::isa_name(isa));
        return names;
      },
      "Instruction sets that are compiled in and that this CPU has, weakest first.");
  m.def(
      "set_isa", [](const std::string& name) { pk::set_active_isa(pk::isa_from_name(name)); }, py::arg("name"),
      "Use another available instruction set, for tests. Raises ValueError for one that is not available.");
  m.def("set_base_product", &pk::set_base_by, py::arg("by"),
        "Who makes the LoRA linear's base product: \"fused\", \"blas\" or \"auto\", for tests and measurements. Raises "
        "ValueError for another name.");
  m.def(
      "base_product",
      [](bool bf16, int64_t rows, bool along_lines) {
        return pk::fuses_base(bf16 ? pk::Dtype::bf16 : pk::Dtype::f32, rows, along_lines) ? "fused" : "blas";
      },
      py::arg("bf16"), py::arg("rows"), py::arg("along_lines"),
      "Who makes the base product of so many rows in bf16 or a wider type: along_lines for x @ weight.T of a weight [N, K] "
      "whose K is contiguous, else for dy @ weight.");
  m.def(
      "goes_past_cache",
      [](uintptr_t address, int64_t rows, int64_t row_bytes) {
        return pk::goes_past_cache(reinterpret_cast<const void*>(address), rows, row_bytes);
      },
      py::arg("address"), py::arg("rows"), py::arg("row_bytes"),
      "Whether a kernel would write an output there past the caches: large, of whole lines, in memory that was used before.");
  m.def(
      "ask_for_huge_pages",
      [](uintptr_t address, int64_t bytes) { return pk::ask_for_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"),
      "Asks for huge pages for memory of an output, where that is large and was never written; returns whether.");
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = PEFT_KERNELS_TORCH_VERSION;
    info["compiler"] = PEFT_KERNELS_COMPILER;
    info["openmp"] = PEFT_KERNELS_OPENMP;
#if defined(PEFT_KERNELS_X86)
    info["isas"] = std::vector<std::string>{"portable", "avx2", "avx512", "avx512bf16"};
#else
    info["isas"] = std::vector<std::string>{"portable"};
#endif
    return info;
  });
}
