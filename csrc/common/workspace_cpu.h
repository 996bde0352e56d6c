// The memory of one call. Compiled once per instruction set.
#pragma once

#include <cstdlib>
#include <new>

#include "blocks_cpu.h"

namespace peft_kernels {
namespace PK_ISA {

// Memory of one call: measured by laying out with a null base, then taken from what the calling thread keeps. Up to
// kKeptBytes are kept: malloc gives such sizes back to the system at once, and the page faults of the next call cost more
// than the products of a few rows (measured: 4.1 instead of 2.6 ms at M = 1, r = 256).
class Workspace {
  static constexpr int64_t kKeptBytes = 16 << 20;
  struct Kept {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool busy = false;
    ~Kept() { free(memory); }
  };
  static Kept& kept() {
    static thread_local Kept one;
    return one;
  }
  static void* take(int64_t bytes) {
    void* memory = aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return memory;
  }
  bool borrowed_;

 public:
  void* memory;
  explicit Workspace(int64_t bytes) : borrowed_(bytes <= kKeptBytes && !kept().busy) {
    bytes = round_up(bytes + 64, 4096);
    Kept& own = kept();
    if (!borrowed_) {
      memory = take(bytes);
      return;
    }
    if (own.bytes < bytes) {
      free(own.memory);
      own.memory = nullptr;
      own.bytes = 0;
      own.memory = take(bytes);
      own.bytes = bytes;
    }
    own.busy = true;
    memory = own.memory;
  }
  ~Workspace() {
    if (borrowed_)
      kept().busy = false;
    else
      free(memory);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
};

}  // namespace PK_ISA
}  // namespace peft_kernels
