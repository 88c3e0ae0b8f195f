// The exact threshold: the rank-th smallest key.
//
// A sample of the keys gives a narrow window that almost surely holds the wanted one. One pass over the data counts
// what lies below the window and lists what lies strictly inside; the answer is an end of the window or a key of the
// list. Ties can only be many at the ends, where they are counted and not listed, so that no distribution makes the
// list long. Where the window misses, bisection over the whole data decides: slower, and exact as well.
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "checks.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "wsn_fast.h"

namespace {

using wsn::parallel_for;
using wsn::Source;

constexpr int64_t kBisect = 8192;    // at most this many keys are bisected at once: they fit the caches
constexpr int64_t kChunk = 4 * wsn::kBlock;
constexpr double kDeviations = 4.5;  // of the sample's rank: a window misses about once in 10^5 calls

int64_t count_upto(const Source &source, int64_t n, int64_t bound, int threads) {
  const auto kernel = wsn::kernels().count_upto;
  std::atomic<int64_t> total{0};
  parallel_for(n, source.width, threads, [&](int64_t begin, int64_t end) {
    total.fetch_add(kernel(source, begin, end, bound), std::memory_order_relaxed);
  });
  return total.load();
}

// The rank-th key by halving [lo, hi], which holds it.
int64_t bisect(const Source &source, int64_t n, int64_t rank, int64_t lo, int64_t hi, int threads) {
  while (lo < hi) {
    const int64_t middle = lo + int64_t((uint64_t(hi) - uint64_t(lo)) / 2);
    if (count_upto(source, n, middle, threads) > rank)
      hi = middle;
    else
      lo = middle + 1;
  }
  return lo;
}

struct Window {
  int64_t lo, hi;      // keys
  int64_t expected;    // keys strictly inside, estimated from above
};

Window window_of(const Source &source, int64_t n, int64_t rank) {
  const int64_t m = wsn::sample_size(n);
  const std::unique_ptr<int64_t[]> memory(new int64_t[size_t(m)]);
  wsn::kernels().sample(source, n, m, memory.get());
  const Source keys = {memory.get(), source.width, wsn::kKeys, source.infinity};
  const double share = double(rank) / double(n);
  const double slack = kDeviations * std::sqrt(double(m) * share * (1 - share)) + 3;
  const int64_t first = int64_t(share * double(m) - slack), last = int64_t(share * double(m) + slack) + 1;
  const int64_t smallest = wsn::smallest_key(source.width), largest = wsn::largest_key(source.width);
  const int64_t lo = first < 0 ? smallest : bisect(keys, m, first, smallest, largest, 1);
  const int64_t hi = last >= m ? largest : bisect(keys, m, last, lo, largest, 1);
  return {lo, hi, int64_t(double(last - first) / double(m) * double(n))};
}

// What one pass over the data finds out about a window.
struct Listed {
  std::atomic<int64_t> below{0}, upto_lo{0}, upto_hi{0}, length{0};
  std::unique_ptr<char[]> keys;
  int64_t room = 0;  // where length is greater, keys are missing from the list

  void collect(const Source &source, int64_t begin, int64_t end, const Window &window) {
    const auto kernel = wsn::kernels().collect;
    alignas(64) int64_t found[kChunk + wsn::kListSlack];
    int64_t counts[3] = {};
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t count = kernel(source, i, std::min(end, i + kChunk), window.lo, window.hi, found, counts);
      const int64_t start = length.fetch_add(count, std::memory_order_relaxed);
      if (start + count <= room)
        std::memcpy(keys.get() + start * source.width, found, size_t(count * source.width));
    }
    below += counts[0], upto_lo += counts[1], upto_hi += counts[2];
  }
};

int64_t search(const Source &source, int64_t n, int64_t rank, int threads) {
  const int64_t smallest = wsn::smallest_key(source.width), largest = wsn::largest_key(source.width);
  if (n <= kBisect) return bisect(source, n, rank, smallest, largest, 1);
  const Window window = window_of(source, n, rank);
  Listed listed;
  listed.room = std::min(n, 2 * window.expected + kChunk);
  listed.keys.reset(new char[size_t(listed.room * source.width)]);
  parallel_for(n, source.width, threads,
               [&](int64_t begin, int64_t end) { listed.collect(source, begin, end, window); });
  if (rank < listed.below) return bisect(source, n, rank, smallest, window.lo, threads);
  if (rank < listed.upto_lo) return window.lo;
  const int64_t inside = rank - listed.upto_lo;
  if (inside < listed.length) {
    if (listed.length > listed.room) return bisect(source, n, rank, window.lo, window.hi, threads);
    return search({listed.keys.get(), source.width, wsn::kKeys, source.infinity}, listed.length, inside, threads);
  }
  return rank < listed.upto_hi ? window.hi : bisect(source, n, rank, window.hi, largest, threads);
}

}  // namespace

int64_t wsn::select(const Source &source, int64_t n, int64_t rank, int threads) {
  try {
    return search(source, n, rank, threads);
  } catch (const std::bad_alloc &) {  // slower, and without a list
    return bisect(source, n, rank, smallest_key(source.width), largest_key(source.width), threads);
  }
}
void wsn::write_element(const Source &source, int64_t key, void *out) {
  const int64_t sign = wsn::smallest_key(source.width);
  // The bit below infinity's is the one that makes a NaN quiet.
  const int64_t quiet = source.infinity | (source.infinity & -source.infinity) >> 1;
  const int64_t bits = key > source.infinity ? quiet : key < 0 ? -key | sign : key;
  if (source.width == 2) {
    const int16_t element = int16_t(bits);
    std::memcpy(out, &element, sizeof element);
  } else if (source.width == 4) {
    const int32_t element = int32_t(bits);
    std::memcpy(out, &element, sizeof element);
  } else {
    std::memcpy(out, &bits, sizeof bits);
  }
}

int wsn_threshold(const void *scores, int dtype, int64_t n, int64_t rank, int rule, void *tau, int num_threads) {
  if (n < 1) return WSN_ERROR_SIZE;
  if (const int code = wsn::check(n, num_threads, scores, tau)) return code;
  if (!wsn::is_dtype(dtype)) return WSN_ERROR_DTYPE;
  if (!wsn::is_rule(rule)) return WSN_ERROR_RULE;
  if (rank < 0 || rank >= n) return WSN_ERROR_RANK;
  const Source source = wsn::source_of(scores, dtype, rule);
  wsn::write_element(source, wsn::select(source, n, rank, num_threads), tau);
  return WSN_OK;
}
