// Which instruction set the CPU kernels use: found at run time, and forced by tests.
#pragma once

#include <string>
#include <vector>

namespace peft_kernels {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Compiled in and supported by this CPU and its operating system, weakest first.
const std::vector<Isa>& available_isas();

// Made by AMD: what a vendor's BLAS gives on it is measured apart.
bool is_amd();

Isa active_isa();
void set_active_isa(Isa isa);  // throws std::invalid_argument for one that is not available

std::string isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::invalid_argument

}  // namespace peft_kernels

// In namespace peft_kernels of a binding: choose() gives the `table`, a constant of type Table that each instruction
// set's namespace defines, of the one in use.
#define PEFT_KERNELS_DECLARE(isa, Table, table) \
  namespace isa {                               \
  extern const Table table;                     \
  }
#if defined(PEFT_KERNELS_X86)
#define PEFT_KERNELS_BY_ISA(Table, table, choose)      \
  PEFT_KERNELS_DECLARE(portable, Table, table)         \
  PEFT_KERNELS_DECLARE(avx2, Table, table)             \
  PEFT_KERNELS_DECLARE(avx512, Table, table)           \
  PEFT_KERNELS_DECLARE(avx512bf16, Table, table)       \
  const Table& choose() {                              \
    switch (active_isa()) {                            \
      case Isa::avx2: return avx2::table;              \
      case Isa::avx512: return avx512::table;          \
      case Isa::avx512bf16: return avx512bf16::table;  \
      default: return portable::table;                 \
    }                                                  \
  }
#else
#define PEFT_KERNELS_BY_ISA(Table, table, choose) \
  PEFT_KERNELS_DECLARE(portable, Table, table)    \
  const Table& choose() { return portable::table; }
#endif
