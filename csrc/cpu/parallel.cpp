// The threads: the OpenMP team of whoever loaded this library, or a pool of our own that sleeps between calls.
//
// PyTorch's team spins for some milliseconds after each operation. A helper of our own that wakes meanwhile finds no
// core: on two cores it came when the caller had done all the work. So where the process has GNU OpenMP, as it has with
// PyTorch on Linux, its team does what is worth as many threads as PyTorch uses. It gets no other size, because GNU
// OpenMP ends and starts threads when the size changes. A child of fork() must not use the team of its parent.
//
// The pool does the rest. There helpers are welcome, not needed: parts are claimed one by one, the caller claims them
// too, and it waits only for helpers that have begun one. So a call on a busy machine, where a helper gets no core,
// takes the time of one thread and not that of the scheduler's next slice.
#include "parallel.hpp"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#ifdef _WIN32
#include <process.h>
#define getpid _getpid
#else
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
#endif

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace {

#if defined(__SSE__) || defined(_M_X64)
unsigned rounding_mode() { return _mm_getcsr(); }
void set_rounding_mode(unsigned mode) { _mm_setcsr(mode); }
#else
unsigned rounding_mode() { return 0; }
void set_rounding_mode(unsigned) {}
#endif

struct Job {
  void (*part)(void *, int64_t);
  void *context;
  int64_t parts;
  int wanted;    // helpers that may still join; guarded by the pool's mutex, like busy
  int busy = 0;  // helpers at work
  Job *following = nullptr;  // in the pool's list, which so needs no memory
  const unsigned mode = rounding_mode();
  std::atomic<int64_t> next{0};

  // The same arithmetic in every thread: of denormal numbers, say, under torch.set_flush_denormal.
  void help() {
    const unsigned own = rounding_mode();
    set_rounding_mode(mode);
    work();
    set_rounding_mode(own);
  }

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) part(context, i);
  }
};

class Pool {
 public:
  const long process = long(getpid());

  void run(Job &job) {
    const int helpers = job.wanted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_threads(helpers);
      Job **end = &jobs_;
      while (*end) end = &(*end)->following;
      *end = &job;
    }
    if (helpers == 1)
      work_.notify_one();
    else
      work_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    remove(&job);
    done_.wait(lock, [&] { return job.busy == 0; });
  }

 private:
  void start_threads(int count) {
    try {
      for (; threads_ < count; ++threads_) std::thread(&Pool::help, this).detach();
    } catch (const std::exception &) {  // no thread to be had: the caller does the work
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return jobs_ != nullptr; });
      Job *const job = jobs_;
      ++job->busy;
      if (--job->wanted == 0) remove(job);
      lock.unlock();
      job->help();
      lock.lock();
      if (--job->busy == 0) done_.notify_all();
    }
  }

  void remove(Job *job) {
    for (Job **at = &jobs_; *at; at = &(*at)->following)
      if (*at == job) {
        *at = job->following;
        return;
      }
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  Job *jobs_ = nullptr;
  int threads_ = 0;
};

constexpr int kMostHelpers = 63;  // of the pool; a team has as many threads as PyTorch gave it

// Never destroyed, since its threads live as long as the process. A child of fork() has the memory of the pool but not
// its threads, and needs another.
Pool &pool() {
  static std::mutex mutex;
  static std::atomic<Pool *> current{nullptr};
  Pool *found = current.load(std::memory_order_acquire);
  if (found && found->process == long(getpid())) return *found;
  const std::lock_guard<std::mutex> lock(mutex);
  found = current.load(std::memory_order_acquire);
  if (!found || found->process != long(getpid())) current.store(found = new Pool, std::memory_order_release);
  return *found;
}

#ifndef _WIN32
// GNU OpenMP, if the process has it.
class Team {
 public:
  Team()
      : parallel_(reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
        size_(reinterpret_cast<Size>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"))) {
    if (pthread_atfork(nullptr, nullptr, [] { forked_ = true; }) != 0) parallel_ = nullptr;
  }

  // Does the job and returns true if the team is there and has as many threads as the job wants.
  bool run(Job &job) const {
    if (!parallel_ || !size_ || forked_ || size_() != job.wanted + 1) return false;
    parallel_([](void *given) { static_cast<Job *>(given)->help(); }, &job, unsigned(job.wanted + 1), 0);
    return true;
  }

 private:
  using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
  using Size = int (*)();
  Parallel parallel_;
  Size size_;
  static std::atomic<bool> forked_;
};
std::atomic<bool> Team::forked_{false};

bool run_in_team(Job &job) {
  static const Team team;
  return team.run(job);
}
#else
bool run_in_team(Job &) { return false; }
#endif

}  // namespace

void wsn::run_parts(void (*part)(void *, int64_t), void *context, int64_t parts, int num_threads) {
  Job job{part, context, parts, int(std::min<int64_t>(num_threads, parts)) - 1};
  if (job.wanted < 1) {
    job.work();
  } else if (!run_in_team(job)) {
    job.wanted = std::min(job.wanted, kMostHelpers);
    pool().run(job);
  }
}
