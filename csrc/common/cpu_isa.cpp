// Detection of the instruction set, and the process-wide choice.
#include "cpu_isa.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace peft_kernels {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::portable};
#if defined(PEFT_KERNELS_X86)
  // The compiler's check also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return found;
  found.push_back(Isa::avx2);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return found;
  found.push_back(Isa::avx512);
  if (__builtin_cpu_supports("avx512bf16")) found.push_back(Isa::avx512bf16);
#endif
  return found;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{available_isas().back()};
  return isa;
}

std::string known() {
  std::string names;
  for (Isa isa : available_isas()) names += (names.empty() ? "" : ", ") + isa_name(isa);
  return names;
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

bool is_amd() {
#if defined(PEFT_KERNELS_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_active_isa(Isa isa) {
  const auto& isas = available_isas();
  if (std::find(isas.begin(), isas.end(), isa) == isas.end())
    throw std::invalid_argument("instruction set " + isa_name(isa) + " is not available here; expected one of " + known());
  active().store(isa, std::memory_order_relaxed);
}

std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("unknown instruction set '" + name + "'; expected one of " + known());
}

}  // namespace peft_kernels
