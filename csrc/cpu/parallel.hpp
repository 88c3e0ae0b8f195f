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

// Calls body(i, begin, end) on ranges that cover [0, size(i)) for each i in [0, count): many tensors as if they were one.
// Every begin is a multiple of kBlock. bytes is what all of it costs in memory traffic. A body must not throw.
template <class Size, class Body>
void parallel_for_all(int64_t count, int64_t bytes, int num_threads, const Size &size, const Body &body) {
  const int64_t threads = std::min<int64_t>(num_threads, bytes / kBytesPerThread);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i)
      if (size(i) > 0) body(i, int64_t(0), size(i));
    return;
  }
  struct Job {
    const Size &size;
    const Body &body;
    int64_t count, step;
    int64_t blocks(int64_t i) const { return (size(i) + kBlock - 1) / kBlock; }
  } job{size, body, count, 0};
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += job.blocks(i);
  job.step = blocks / (threads * 8) + 1;
  run_parts(
      [](void *context, int64_t part) {
        const Job &j = *static_cast<Job *>(context);
        const int64_t first = part * j.step, last = first + j.step;  // blocks, counted through all tensors
        int64_t before = 0;                                          // blocks of the tensors before tensor i
        for (int64_t i = 0; i < j.count && before < last; before += j.blocks(i++)) {
          const int64_t begin = std::max<int64_t>(0, first - before) * kBlock;
          const int64_t end = std::min(j.size(i), (last - before) * kBlock);
          if (begin < end) j.body(i, begin, end);
        }
      },
      &job, (blocks + job.step - 1) / job.step, int(threads));
}

}  // namespace wsn
