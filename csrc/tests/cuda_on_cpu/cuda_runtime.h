// Just enough of CUDA to build csrc/cuda with a host compiler and run it on the CPU, for tests of its logic alone.
//
//   g++ -std=c++17 -x c++ -Icsrc/tests/cuda_on_cpu -Icsrc/include csrc/cuda/select.cu
//
// A block is a fiber per CUDA thread, all on one thread of the host, and a launch runs blocks on several such threads
// at once, in random order. A fiber gives way at barriers and warp operations and, at random, at atomics; the next one
// is drawn at random, so that code which leans on an order that CUDA does not promise fails sooner or later. Threads
// that wait for one another at different places end the program with a message.
//
// Memory ordering is that of the host, which hides missing fences; -fsanitize=thread does see them. There each CUDA
// thread is a thread to the sanitizer, and only what orders memory in CUDA does so: launches, __syncthreads, and
// __threadfence on both sides of what another thread reads. Warp operations and atomicAdd alone do not.
//
// For a single source file that includes it: its functions are defined here.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char *, int);
extern "C" void AnnotateIgnoreReadsEnd(const char *, int);
extern "C" void AnnotateIgnoreWritesBegin(const char *, int);
extern "C" void AnnotateIgnoreWritesEnd(const char *, int);
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a block has a host thread to itself

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline thread_local dim3 threadIdx, blockIdx;

namespace cuda_on_cpu {

// What tells the thread sanitizer which CUDA threads exist and what orders their memory accesses.
#if defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 512 << 10;
inline void *new_identity() { return __tsan_create_fiber(0); }
inline void *own_identity() { return __tsan_get_current_fiber(); }
inline void end_identity(void *identity) {
  if (identity != nullptr) __tsan_destroy_fiber(identity);
}
inline void switch_identity(void *identity) { __tsan_switch_to_fiber(identity, 1); }  // 1: it orders nothing
inline void release(void *at) { __tsan_release(at); }
inline void acquire(void *at) { __tsan_acquire(at); }
struct Unseen {  // this header's own bookkeeping is no CUDA memory
  Unseen() { AnnotateIgnoreReadsBegin(__FILE__, 0), AnnotateIgnoreWritesBegin(__FILE__, 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, 0), AnnotateIgnoreReadsEnd(__FILE__, 0); }
};
#else
constexpr size_t kStackBytes = 256 << 10;  // reserved; a page or two are touched
inline void *new_identity() { return nullptr; }
inline void *own_identity() { return nullptr; }
inline void end_identity(void *) {}
inline void switch_identity(void *) {}
inline void release(void *) {}
inline void acquire(void *) {}
struct Unseen {
  Unseen() {}
};
#endif

constexpr int kMaxThreads = 1024;

inline std::atomic<unsigned> seed{1};  // drawn from by each launch
inline std::atomic<int> workers{3};    // host threads per launch
inline std::atomic<int64_t> launches{0};

[[noreturn]] inline void fail(const char *what) {
  std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

struct Random {
  uint32_t state;
  uint32_t below(uint32_t n) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return static_cast<uint32_t>(static_cast<uint64_t>(state) * n >> 32);
  }
};

// A meeting of fibers, to which each may bring a value. Values of two meetings in turn have room, since nobody can be
// at the one after next before all have left this one.
struct Meeting {
  const char *name = nullptr;
  int arrived = 0;
  uint64_t values[2][32];
  int waiting[kMaxThreads];
};

// A place to go on from. ucontext gives a fiber its stack; after that jumps do, which are no system calls. (The address
// and thread sanitizers know the stacks of ucontext only.)
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;

  void go_to(Place &other) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    swapcontext(&context, &other.context);
#else
    if (_setjmp(jump) != 0) return;
    if (other.begun) _longjmp(other.jump, 1);
    setcontext(&other.context);
#endif
  }
};

struct Fiber {
  Place place;
  void *identity = nullptr;
  unsigned meetings = 0;  // of its warp
  bool done = true;
};

// A host thread's block of fibers.
class Block {
 public:
  Block() : stacks_(static_cast<char *>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (stacks_ == MAP_FAILED) fail("no memory for stacks");
  }
  ~Block() {
    for (Fiber &fiber : fibers_) end_identity(fiber.identity);
    munmap(stacks_, kMaxThreads * kStackBytes);
  }
  Block(const Block &) = delete;

  template <class Kernel>
  void run(const Kernel &kernel, unsigned index, int threads, uint32_t random) {
    const Unseen unseen;
    threads_ = alive_ = threads;
    random_.state = random | 1;
    kernel_ = [](const void *function) { (*static_cast<const Kernel *>(function))(); };
    function_ = &kernel;
    blockIdx = dim3(index);
    home_.begun = true;
    home_identity_ = own_identity();
    release(this);
    ready_count_ = 0;
    for (int i = 0; i < threads; ++i) start(i);
    while (ready_count_ > 0) {
      const uint32_t pick = random_.below(ready_count_);
      current_ = ready_[pick];
      ready_[pick] = ready_[--ready_count_];
      threadIdx = dim3(current_);
      switch_identity(fibers_[current_].identity);
      home_.go_to(fibers_[current_].place);
      fibers_[current_].place.begun = true;
    }
    if (alive_ > 0) fail("threads wait for others that wait elsewhere or have ended");
    acquire(this);
  }

  void maybe_yield() {
    const Unseen unseen;
    if (random_.below(32) == 0) {
      ready_[ready_count_++] = current_;
      leave();
    }
  }

  void sync_threads() {
    const Unseen unseen;
    release(&all_);
    meet(all_, "__syncthreads", threads_);
    acquire(&all_);
  }

  // Each lane brings a value to `name`; combine(values of all lanes, own lane) is what it takes away.
  template <class Combine>
  auto meet_warp(const char *name, unsigned mask, uint64_t value, const Combine &combine) {
    const Unseen unseen;
    if (mask != 0xffffffffu) fail("only whole warps are supported");
    const int lane = current_ % 32;
    Meeting &warp = warps_[current_ / 32];
    uint64_t *const values = warp.values[fibers_[current_].meetings++ % 2];
    values[lane] = value;
    meet(warp, name, 32);
    return combine(values, lane);
  }

 private:
  void start(int i) {
    Fiber &fiber = fibers_[i];
    if (fiber.identity == nullptr) fiber.identity = new_identity();
    fiber.meetings = 0;
    fiber.done = fiber.place.begun = false;
    ucontext_t &context = fiber.place.context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_ + i * kStackBytes;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, reinterpret_cast<void (*)()>(entry), 2, static_cast<unsigned>(address() >> 32),
                static_cast<unsigned>(address()));
    ready_[ready_count_++] = i;
  }

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(this); }

  static void entry(unsigned high, unsigned low) {
    Block *const block = reinterpret_cast<Block *>(static_cast<uintptr_t>(high) << 32 | low);
    acquire(block);
    block->kernel_(block->function_);
    release(block);
    block->end();
    block->leave();
  }

  void end() {
    const Unseen unseen;
    fibers_[current_].done = true;
    --alive_;
  }

  void leave() {
    Fiber &fiber = fibers_[current_];
    switch_identity(home_identity_);
    fiber.place.go_to(home_);
  }

  void meet(Meeting &meeting, const char *name, int expected) {
    if (meeting.arrived > 0 && meeting.name != name) fail("threads of a warp met at different operations");
    meeting.name = name;
    meeting.waiting[meeting.arrived++] = current_;
    if (meeting.arrived == expected) {
      for (int i = 0; i < expected; ++i) ready_[ready_count_++] = meeting.waiting[i];
      meeting.arrived = 0;
    }
    leave();
  }

  char *const stacks_;
  Place home_;
  void *home_identity_ = nullptr;
  void (*kernel_)(const void *) = nullptr;
  const void *function_ = nullptr;
  Random random_{1};
  Fiber fibers_[kMaxThreads];
  int threads_ = 0, alive_ = 0, current_ = 0, ready_count_ = 0;
  int ready_[kMaxThreads];
  Meeting all_, warps_[kMaxThreads / 32];
};

inline thread_local Block *current = nullptr;  // of this host thread

template <class Kernel>
void run_blocks(Block &block, const Kernel &kernel, const std::vector<unsigned> &order, std::atomic<size_t> &next,
                int threads, uint32_t random) {
  current = &block;
  for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) {
    block.run(kernel, order[i], threads, random * (2 * order[i] + 1));
  }
}

template <class Kernel>
void launch(const Kernel &kernel, unsigned blocks, int threads) {
  Random random{seed.fetch_add(0x9e3779b9) | 1};
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  for (unsigned i = blocks; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);

  static thread_local std::vector<std::unique_ptr<Block>> pool;  // making one takes longer than running most kernels
  const size_t wanted = std::min<size_t>(blocks, workers);
  while (pool.size() < wanted) pool.push_back(std::make_unique<Block>());
  std::atomic<size_t> next{0};
  std::vector<std::thread> others;
  for (size_t i = 1; i < wanted; ++i) {
    Block &block = *pool[i];
    others.emplace_back([&, i] { run_blocks(block, kernel, order, next, threads, random.state + i); });
  }
  run_blocks(*pool[0], kernel, order, next, threads, random.state);
  for (std::thread &other : others) other.join();
  ++launches;
}

}  // namespace cuda_on_cpu

template <class... P, size_t... kIndex>
cudaError_t launch_on_cpu(void (*kernel)(P...), unsigned blocks, int threads, void **arguments,
                          std::index_sequence<kIndex...>) {
  cuda_on_cpu::launch([=] { kernel(*static_cast<P *>(arguments[kIndex])...); }, blocks, threads);
  return cudaSuccess;
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **arguments, size_t, cudaStream_t) {
  if (grid.x < 1 || block.x < 1 || block.x > cuda_on_cpu::kMaxThreads || block.x % 32 != 0)
    return cudaErrorInvalidConfiguration;
  return launch_on_cpu(kernel, grid.x, static_cast<int>(block.x), arguments, std::index_sequence_for<P...>());
}

inline void __syncthreads() { cuda_on_cpu::current->sync_threads(); }

// Its write orders it among all fences, as two fences are around an atomic that the second thread saw from the first.
inline void __threadfence() {
  static std::atomic<int> fences;
  fences.fetch_add(1, std::memory_order_seq_cst);
}

template <class T>
T atomicAdd(T *p, T value) {
  cuda_on_cpu::current->maybe_yield();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

inline unsigned atomicInc(unsigned *p, unsigned last) {
  cuda_on_cpu::current->maybe_yield();
  unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= last ? 0 : old + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T __ldg(const T *p) {
  return *p;
}

template <class T>
T __ldcg(const T *p) {
  return *p;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::current->meet_warp("__ballot_sync", mask, predicate != 0, [](const uint64_t *values, int) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(values[i]) << i;
    return votes;
  });
}

inline int __any_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::current->meet_warp("__any_sync", mask, predicate != 0, [](const uint64_t *values, int) {
    uint64_t any = 0;
    for (int i = 0; i < 32; ++i) any |= values[i];
    return static_cast<int>(any);
  });
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return cuda_on_cpu::current->meet_warp("__reduce_add_sync", mask, value, [](const uint64_t *values, int) {
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += static_cast<unsigned>(values[i]);
    return sum;
  });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::current->meet_warp("__shfl_sync", mask, static_cast<uint64_t>(value),
                                         [=](const uint64_t *values, int) { return static_cast<T>(values[lane]); });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return cuda_on_cpu::current->meet_warp(
      "__shfl_up_sync", mask, static_cast<uint64_t>(value),
      [=](const uint64_t *values, int own) { return static_cast<T>(values[own >= distance ? own - distance : own]); });
}

// For tests that load the result: how it runs, and how many launches there have been.
extern "C" __attribute__((visibility("default"), used)) inline int64_t cuda_on_cpu_launches() {
  return cuda_on_cpu::launches;
}
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_cpu_configure(unsigned seed, int workers) {
  cuda_on_cpu::seed = seed;
  cuda_on_cpu::workers = workers;
}
