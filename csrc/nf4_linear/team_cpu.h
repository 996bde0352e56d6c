// One product by a team of threads, and how they share it. Compiled once per instruction set.
#pragma once

#include "../common/low_rank_cpu.h"
#include "nf4_linear.h"

namespace peft_kernels {
namespace PK_ISA {

constexpr int64_t kPage = 4096;                      // bytes; what the hardware fetches ahead ends there
constexpr int64_t kApart = kPage / sizeof(int64_t);  // counters of threads

// Tasks 0 .. count - 1, each taken by one thread: those of its own part first, so that neighbours are mostly done by one, then
// what others have not come to.
class Tasks {
  int64_t count_ = 0;
  int64_t* next_ = nullptr;
  int64_t start(int id) const { return count_ * id / team_size(); }

 public:
  Tasks(Arena& arena, int64_t count, int threads) : count_(count), next_(arena.take<int64_t>(threads * kApart)) {}
  int64_t count() const { return count_; }
  // Before the barrier behind which tasks are taken, by every thread.
  void begin(int id) const { __atomic_store_n(next_ + id * kApart, start(id), __ATOMIC_RELAXED); }
  // The next one, or count().
  int64_t take(int id) const {
    for (int i = 0; i < team_size(); ++i) {
      const int of = (id + i) % team_size();
      const int64_t task = __atomic_fetch_add(next_ + of * kApart, 1, __ATOMIC_RELAXED);
      if (task < start(of + 1)) return task;
    }
    return count_;
  }
};

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
