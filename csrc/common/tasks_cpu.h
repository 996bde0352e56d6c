// How the threads of a team share what is to be done. Compiled once per instruction set.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "blocks_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

#if defined(_OPENMP)
static inline int thread_id() { return omp_get_thread_num(); }
static inline int team_size() { return omp_get_num_threads(); }
#else
static inline int thread_id() { return 0; }
static inline int team_size() { return 1; }
#endif

constexpr int64_t kPage = 4096;                      // bytes; what the hardware fetches ahead ends there
constexpr int64_t kApart = kPage / sizeof(int64_t);  // counters of threads

// Where the part of thread `id` in tasks 0 .. count - 1 begins; it ends where that of the next one does.
static inline int64_t part_start(int64_t count, int id, int threads) { return count * id / threads; }

// Tasks 0 .. count - 1, each taken by one thread: those of its own part first, so that neighbours are mostly done by one, then
// what others have not come to.
class Tasks {
  int64_t count_ = 0;
  int64_t* next_ = nullptr;
  int64_t start(int id) const { return part_start(count_, id, team_size()); }

 public:
  Tasks(Arena& arena, int64_t count, int threads) : count_(count), next_(arena.take<int64_t>(threads * kApart)) {}
  int64_t count() const { return count_; }
  // As many others, with the same counters: when all of these are done.
  Tasks then(int64_t count) const {
    Tasks others = *this;
    others.count_ = count;
    return others;
  }
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

}  // namespace PK_ISA
}  // namespace peft_kernels
