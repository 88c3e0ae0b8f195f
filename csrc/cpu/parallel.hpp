// Splitting a range over threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wsn {

constexpr int64_t kBlock = 1024;  // elements: a multiple of 8 (whole bytes of packed masks), some buffers of it fit L1

// How much work (bytes touched) makes another thread worth its waking: some 20 us.
constexpr int64_t kBytesPerThread = 1 << 18;

// Calls part(context, i) once for each i in [0, parts), in up to num_threads threads, this one among them.
void run_parts(void (*part)(void *context, int64_t i), void *context, int64_t parts, int num_threads);

// Calls body(begin, end) on ranges that cover [0, n). Every begin is a multiple of kBlock. unit_bytes is what an
// element costs in memory traffic. A body must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t unit_bytes, int num_threads, const Body &body) {
  const int64_t enough = std::max(kBlock, kBytesPerThread / unit_bytes);
  const int64_t threads = std::min<int64_t>(num_threads, n / enough);
  if (threads <= 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
  // More parts than threads, so that one that is late leaves its share to the others; claims are cheap.
  const int64_t wanted = std::min<int64_t>(threads * 8, n / (enough / 4 + 1));
  struct Job {
    const Body &body;
    int64_t n, step;
  } job{body, n, (n / wanted / kBlock + 1) * kBlock};
  run_parts(
      [](void *context, int64_t i) {
        const Job &j = *static_cast<Job *>(context);
        j.body(i * j.step, std::min(j.n, (i + 1) * j.step));
      },
      &job, (n + job.step - 1) / job.step, int(threads));
}

}  // namespace wsn
