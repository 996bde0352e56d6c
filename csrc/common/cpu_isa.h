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
