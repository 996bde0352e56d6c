// The switch of the Hopper kernels of lora_linear, for tests and benchmarks that want the general ones.
#pragma once

namespace peft_kernels {

void enable_hopper(bool enabled);

}  // namespace peft_kernels
