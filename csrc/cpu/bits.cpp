// Packed masks on the host. The layout and every contract are in wsn_fast.h.
#include "wsn_fast.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>

namespace {

constexpr uint64_t kOnes = 0x0101010101010101;  // 1 in each byte
constexpr int kMaxThreads = 64;
constexpr int64_t kMinBytesPerThread = 1 << 16;  // packed bytes; below this, starting a thread costs more than it saves

// Byte i of the buffer becomes bits 8i..8i+7, whatever the byte order; compilers turn this into one load (or store).
inline uint64_t load64(const uint8_t *p) {
  return uint64_t(p[0]) | uint64_t(p[1]) << 8 | uint64_t(p[2]) << 16 | uint64_t(p[3]) << 24 | uint64_t(p[4]) << 32 |
         uint64_t(p[5]) << 40 | uint64_t(p[6]) << 48 | uint64_t(p[7]) << 56;
}

inline void store64(uint8_t *p, uint64_t x) {
  p[0] = uint8_t(x), p[1] = uint8_t(x >> 8), p[2] = uint8_t(x >> 16), p[3] = uint8_t(x >> 24);
  p[4] = uint8_t(x >> 32), p[5] = uint8_t(x >> 40), p[6] = uint8_t(x >> 48), p[7] = uint8_t(x >> 56);
}

// 1 in each byte of x that is not 0. The addition cannot carry from byte to byte: 0x7f + 0x7f < 0x100.
inline uint64_t nonzero_bytes(uint64_t x) {
  return ((((x & 0x7f * kOnes) + 0x7f * kOnes) | x) >> 7) & kOnes;
}

// Eight bytes of 0 or 1 to eight bits. The multiplier moves byte i to bit 56 + i; no two partial products share a bit.
inline uint8_t gather_bits(uint64_t bytes) { return uint8_t((bytes * 0x0102040810204080) >> 56); }

// Eight bits to eight bytes of 0 or 1: copy the bits to every byte, keep bit i in byte i.
inline uint64_t scatter_bits(uint8_t bits) { return nonzero_bytes((bits * kOnes) & 0x8040201008040201); }

inline uint64_t popcount64(uint64_t x) {
  x -= (x >> 1) & 0x55 * kOnes;
  x = (x & 0x33 * kOnes) + ((x >> 2) & 0x33 * kOnes);
  x = (x + (x >> 4)) & 0x0f * kOnes;
  return (x * kOnes) >> 56;
}

// Calls body(begin, end) on ranges that cover [0, nbytes), in up to num_threads threads.
template <class Body>
void parallel_for(int64_t nbytes, int num_threads, Body body) {
  const int64_t wanted = std::min<int64_t>(std::min(num_threads, kMaxThreads), nbytes / kMinBytesPerThread);
  const int64_t parts = std::max<int64_t>(wanted, 1);
  const int64_t step = nbytes / parts;
  std::thread workers[kMaxThreads];  // an array, so that nothing but a thread's own start can fail
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t begin = part * step, end = part + 1 == parts ? nbytes : begin + step;
    try {
      workers[part] = std::thread(body, begin, end);
    } catch (const std::exception &) {  // no thread to be had: this one does the work
      body(begin, end);
    }
  }
  body(0, parts == 1 ? nbytes : step);
  for (std::thread &worker : workers)
    if (worker.joinable()) worker.join();
}

int check(const void *a, const void *b, int64_t size, int num_threads) {
  if (size < 0) return WSN_ERROR_SIZE;
  if (num_threads < 1) return WSN_ERROR_THREADS;
  return size > 0 && (a == nullptr || b == nullptr) ? WSN_ERROR_NULL : WSN_OK;
}

}  // namespace

int wsn_abi_version(void) { return WSN_ABI_VERSION; }

const char *wsn_error_message(int code) {
  switch (code) {
    case WSN_OK: return "no error";
    case WSN_ERROR_NULL: return "a pointer is NULL although its size is not 0";
    case WSN_ERROR_SIZE: return "a size is negative";
    case WSN_ERROR_THREADS: return "num_threads is less than 1";
    default: return "unknown error code";
  }
}

int wsn_pack_bits(const uint8_t *mask, int64_t n, uint8_t *packed, int num_threads) {
  if (const int code = check(mask, packed, n, num_threads)) return code;
  const int64_t whole = n / 8, rest = n % 8;
  parallel_for(whole, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) packed[i] = gather_bits(nonzero_bytes(load64(mask + 8 * i)));
  });
  if (rest) {
    uint8_t tail[8] = {};
    std::memcpy(tail, mask + 8 * whole, size_t(rest));
    packed[whole] = gather_bits(nonzero_bytes(load64(tail)));
  }
  return WSN_OK;
}

int wsn_unpack_bits(const uint8_t *packed, int64_t n, uint8_t *mask, int num_threads) {
  if (const int code = check(packed, mask, n, num_threads)) return code;
  const int64_t whole = n / 8, rest = n % 8;
  parallel_for(whole, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) store64(mask + 8 * i, scatter_bits(packed[i]));
  });
  if (rest) {
    uint8_t tail[8];
    store64(tail, scatter_bits(packed[whole]));
    std::memcpy(mask + 8 * whole, tail, size_t(rest));
  }
  return WSN_OK;
}

int wsn_or_bits(uint8_t *dst, const uint8_t *src, int64_t nbytes, int num_threads) {
  if (const int code = check(dst, src, nbytes, num_threads)) return code;
  parallel_for(nbytes, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dst[i] |= src[i];
  });
  return WSN_OK;
}

int wsn_popcount_bits(const uint8_t *packed, int64_t nbytes, int64_t *out, int num_threads) {
  if (const int code = check(packed, packed, nbytes, num_threads)) return code;
  if (out == nullptr) return WSN_ERROR_NULL;
  std::atomic<int64_t> total{0};
  parallel_for(nbytes, num_threads, [=, &total](int64_t begin, int64_t end) {
    uint64_t count = 0;
    for (; end - begin >= 8; begin += 8) count += popcount64(load64(packed + begin));
    for (; begin < end; ++begin) count += popcount64(packed[begin]);
    total += int64_t(count);
  });
  *out = total;
  return WSN_OK;
}
