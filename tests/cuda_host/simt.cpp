// Runs the threads of a kernel as fibers of one host thread, a block after the other: a fiber runs until it waits at a
// barrier or a warp collective, or returns. Also the memory between pages that fault, and the C API for the tests.
#include "simt.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

namespace {

// ---- memory between guard pages ----

constexpr unsigned char kPoison = 0xff;  // NaN in every float format
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

[[noreturn]] void out_of_memory(const char* what) {
  fprintf(stderr, "simt: %s: %s\n", what, strerror(errno));
  abort();
}

unsigned char* map_pages(size_t bytes, int flags = 0) {
  void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (map == MAP_FAILED) out_of_memory("mmap");
  return static_cast<unsigned char*>(map);
}

void guard(void* page) {
  if (mprotect(page, kPage, PROT_NONE) != 0) out_of_memory("mprotect");
}

// `bytes` that end as close before a page that faults as the alignment lets them; the rest of their pages is poison too.
struct Guarded {
  unsigned char *map, *begin;
  size_t pages, bytes;

  Guarded(size_t bytes, size_t alignment) : pages(up(bytes + 1, kPage)), bytes(bytes) {
    map = map_pages(pages + 2 * kPage);
    guard(map);
    guard(map + kPage + pages);
    begin = map + kPage + (pages - bytes) / alignment * alignment;
    poison();
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map, pages + 2 * kPage); }

  void poison() { memset(map + kPage, kPoison, pages); }
  // Whether nothing was written beside the bytes.
  bool intact() const {
    for (const unsigned char* p = map + kPage; p < map + kPage + pages; ++p)
      if (*p != kPoison && (p < begin || p >= begin + bytes)) return false;
    return true;
  }
  bool holds(const void* p) const { return p >= map && p < map + pages + 2 * kPage; }
};

std::map<void*, std::unique_ptr<Guarded>> buffers;  // of simt_alloc, by their begin
std::map<const void*, Guarded> objects;             // shared<T>() of the running block, and of those before it
std::map<size_t, Guarded> dynamic;                  // dynamic shared memory by size

// ---- fibers ----

enum class State { kReady, kBarrier, kWarp, kReturned };

struct Fiber {
  jmp_buf context;
  uint3 index;
  State state = State::kReturned;
  Where where;
  unsigned mask = 0;
  void* argument = nullptr;
};

constexpr size_t kStack = 256 << 10, kMostThreads = 1024;

struct Engine {
  std::vector<Fiber> fibers;  // those of the running block; each lives on its stack from block to block
  unsigned char* stacks = nullptr;
  const std::function<void()>* thread = nullptr;
  size_t current = 0, running = 0, at_barrier = 0;
  size_t dynamic_bytes = 0;
  jmp_buf scheduler, give_up;
  bool reverse = false;
  std::string error;
} engine;

Fiber& self() { return engine.fibers[engine.current]; }

// To the scheduler; comes back when the fiber is ready again. (_setjmp and _longjmp: no system call on the way.)
void wait() {
  if (_setjmp(self().context) == 0) _longjmp(engine.scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*engine.thread)();
    self().state = State::kReturned;
    --engine.running;
    wait();
  }
}

// Gives fiber `i` a stack with a guard page below it, and runs it up to its first wait for work.
void start(size_t i) {
  ucontext_t begin, here;
  getcontext(&begin);
  unsigned char* stack = engine.stacks + i * (kStack + kPage);
  guard(stack);
  begin.uc_stack.ss_sp = stack + kPage;
  begin.uc_stack.ss_size = kStack;
  begin.uc_link = nullptr;
  makecontext(&begin, fiber_main, 0);
  engine.current = i;
  if (_setjmp(engine.scheduler) == 0) swapcontext(&here, &begin);
}

// The fibers of one launch. Their guard pages are two mappings a fiber, of the 65,530 that Linux grants a process, and
// every loaded library is a shim of its own: stacks kept from launch to launch would end a long run of tests.
struct Fibers {
  size_t bytes;

  explicit Fibers(size_t count) : bytes(count * (kStack + kPage)) {
    static const std::function<void()> nothing = [] {};
    engine.stacks = map_pages(bytes, MAP_NORESERVE);
    engine.thread = &nothing;
    engine.fibers.reserve(count);
    while (engine.fibers.size() < count) {
      engine.fibers.emplace_back();
      start(engine.fibers.size() - 1);
    }
  }
  Fibers(const Fibers&) = delete;
  ~Fibers() {  // where a launch failed they are in the middle of the kernel; their frames own nothing
    engine.fibers.clear();
    munmap(engine.stacks, bytes);
  }
};

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

// "threads wait for one another for ever: 31 at the barrier of x.cu:12, 1 have returned"
std::string deadlock(size_t threads) {
  std::map<std::string, int> waiting;
  for (size_t i = 0; i < threads; ++i) {
    const Fiber& fiber = engine.fibers[i];
    ++waiting[fiber.state == State::kReturned  ? "have returned"
              : fiber.state == State::kBarrier ? "at the barrier of " + place(fiber.where)
                                               : "at the warp collective of " + place(fiber.where)];
  }
  std::string text = "threads wait for one another for ever: ";
  for (const auto& [what, count] : waiting) text += std::to_string(count) + " " + what + ", ";
  return text.substr(0, text.size() - 2);
}

void resume(size_t i) {
  engine.current = i;
  threadIdx = self().index;
  if (_setjmp(engine.scheduler) == 0) _longjmp(self().context, 1);
}

void run_block(size_t threads) {
  for (auto& [key, memory] : objects) memory.poison();
  for (auto& [key, memory] : dynamic) memory.poison();
  for (size_t i = 0; i < threads; ++i) {
    const unsigned t = static_cast<unsigned>(i);
    engine.fibers[i].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    engine.fibers[i].state = State::kReady;
  }
  engine.running = threads;
  engine.at_barrier = 0;
  while (engine.running > 0) {
    bool progress = false;
    for (size_t n = 0; n < threads; ++n) {
      const size_t i = engine.reverse ? threads - 1 - n : n;
      if (engine.fibers[i].state != State::kReady) continue;
      resume(i);
      progress = true;
    }
    if (!progress) fail("%s", deadlock(threads).c_str());
  }
  for (const auto& [key, memory] : objects)
    if (!memory.intact()) fail("a write beside a shared object of %zu bytes", memory.bytes);
  for (const auto& [key, memory] : dynamic)
    if (!memory.intact()) fail("a write beside dynamic shared memory of %zu bytes", memory.bytes);
}

// ---- faults ----

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};

void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL || signal == SIGTRAP) fail("undefined behaviour (alignment, overflow, shift or index)");
  const auto* address = static_cast<unsigned char*>(info->si_addr);
  for (const auto& [begin, memory] : buffers)
    if (memory->holds(address))
      fail("access %td bytes from the start of a buffer of %zu", address - memory->begin, memory->bytes);
  for (const auto& [key, memory] : objects)
    if (memory.holds(address))
      fail("access %td bytes from the start of a shared object of %zu", address - memory.begin, memory.bytes);
  for (const auto& [key, memory] : dynamic)
    if (memory.holds(address))
      fail("access %td bytes from the start of dynamic shared memory of %zu", address - memory.begin, memory.bytes);
  fail("access to %p, which is no buffer's", info->si_addr);
}

// Turns signals into a failed launch while it lives.
struct Signals {
  struct sigaction before[std::size(kSignals)];
  stack_t stack_before;
  std::vector<char> stack = std::vector<char>(64 << 10);

  Signals() {
    stack_t own{};
    own.ss_sp = stack.data();
    own.ss_size = stack.size();
    sigaltstack(&own, &stack_before);
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before[i]);
  }
  ~Signals() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

bool launchable(dim3 grid, dim3 block, size_t dynamic_bytes) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  return grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 &&
         threads > 0 && threads <= kMostThreads && block.z <= 64 && dynamic_bytes <= 227 << 10;
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char at[128];
  snprintf(at, sizeof at, "thread (%u, %u, %u) of block (%u, %u, %u): ", threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x,
           blockIdx.y, blockIdx.z);
  engine.error = at + std::string(text);
  _longjmp(engine.give_up, 1);
}

void barrier(const Where& where) {
  const size_t threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
  self().state = State::kBarrier;
  self().where = where;
  for (size_t i = 0; i < threads && engine.at_barrier > 0; ++i) {
    const Fiber& other = engine.fibers[i];
    if (other.state != State::kBarrier || i == engine.current) continue;
    if (!same(other.where, where))
      fail("is at the barrier of %s, others at that of %s", place(where).c_str(), place(other.where).c_str());
    break;  // all that wait were compared with one another
  }
  if (++engine.at_barrier < threads) return wait();
  engine.at_barrier = 0;
  for (size_t i = 0; i < threads; ++i) engine.fibers[i].state = State::kReady;
}

int lane() { return static_cast<int>(engine.current % 32); }

void warp_collective(unsigned mask, void* argument, Together together, const Where& where) {
  const size_t threads = size_t{blockDim.x} * blockDim.y * blockDim.z, first = engine.current / 32 * 32;
  if ((mask >> lane() & 1) == 0) fail("calls a warp collective at %s outside its mask %08x", place(where).c_str(), mask);
  Fiber& own = self();
  own.state = State::kWarp;
  own.where = where;
  own.mask = mask;
  own.argument = argument;
  void* arguments[32] = {};
  for (size_t i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= threads) fail("mask %08x of %s names lanes that the block lacks", mask, place(where).c_str());
    const Fiber& other = engine.fibers[first + i];
    if (other.state != State::kWarp || other.mask != mask || !same(other.where, where)) return wait();
    arguments[i] = other.argument;
  }
  together(arguments, mask);
  for (size_t i = 0; i < 32; ++i)
    if (mask >> i & 1) engine.fibers[first + i].state = State::kReady;
}

void* shared_object(const void* key, size_t bytes, size_t alignment) {
  return objects.try_emplace(key, bytes, alignment).first->second.begin;
}

void* dynamic_shared() { return dynamic.try_emplace(engine.dynamic_bytes, engine.dynamic_bytes, 128).first->second.begin; }

cudaError_t run(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& thread) {
  engine.error.clear();
  if (!launchable(grid, block, dynamic_bytes)) {
    engine.error = "no GPU takes a grid or block of that size";
    return cudaErrorInvalidConfiguration;
  }
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  const Fibers fibers(threads);
  engine.thread = &thread;
  engine.dynamic_bytes = dynamic_bytes;
  gridDim = grid;
  blockDim = block;
  const Signals signals;
  if (_setjmp(engine.give_up) != 0) return cudaErrorLaunchFailure;
  for (size_t n = 0; n < blocks; ++n) {
    const size_t b = engine.reverse ? blocks - 1 - n : n;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(threads);
  }
  return cudaSuccess;
}

}  // namespace simt

extern "C" {

// Of the launch before: "" where it went well.
const char* simt_error() { return simt::engine.error.c_str(); }

// Whether threads and blocks run from the last to the first.
void simt_reverse(int on) { simt::engine.reverse = on != 0; }

// Poisoned memory between pages that fault, its end as close to one as the alignment lets it.
void* simt_alloc(size_t bytes, size_t alignment) {
  auto memory = std::make_unique<simt::Guarded>(bytes, alignment);
  void* begin = memory->begin;
  simt::buffers[begin] = std::move(memory);
  return begin;
}

// 1 where something beside the memory was overwritten, 0 otherwise.
int simt_free(void* begin) {
  const auto found = simt::buffers.find(begin);
  const int damaged = !found->second->intact();
  simt::buffers.erase(found);
  return damaged;
}
}
