// One product by a team of threads. Compiled once per instruction set.
#pragma once

#include "../common/tasks_cpu.h"
#include "../common/workspace_cpu.h"
#include "nf4_linear.h"

namespace peft_kernels {
namespace PK_ISA {

// A Way(arena, f) takes its memory from the arena, of which a first one without memory finds the size; run() is what each
// thread of the team does.
template <class Way>
static void by_team(const Nf4Linear& f) {
  Arena size{nullptr};
  Way(size, f);
  Workspace space(size.used);
  Arena arena{static_cast<char*>(space.memory)};
  const Way shared(arena, f);
#pragma omp parallel num_threads(f.threads)
  {
    const Way own = shared;  // on each thread's own stack: another's is written to meanwhile
    own.run();
  }
}

}  // namespace PK_ISA
}  // namespace peft_kernels
