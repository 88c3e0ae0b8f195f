// Packed masks on the host, and what else needs no arithmetic. The contracts are in wsn_fast.h.
#include "bits.hpp"

#include <atomic>
#include <cstring>

#include "checks.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "wsn_fast.h"

using wsn::check;
using wsn::parallel_for;
using wsn::parallel_for_all;

namespace {

inline uint64_t popcount64(uint64_t x) {
  x -= (x >> 1) & 0x55 * kOnes;
  x = (x & 0x33 * kOnes) + ((x >> 2) & 0x33 * kOnes);
  x = (x + (x >> 4)) & 0x0f * kOnes;
  return (x * kOnes) >> 56;
}

// The pointers are arguments: what a lambda holds could be written through a pointer to bytes, so that the compiler would
// load it again for every byte.
void or_bytes(uint8_t *dst, const uint8_t *src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = uint8_t(dst[i] | src[i]);
}

// Blocks without a frozen element, the most at first, are not touched.
template <class U>
void restore(char *param, const char *saved, const uint8_t *bits, int64_t begin, int64_t end) {
  if (bits == nullptr) {
    const int64_t first = begin * int64_t(sizeof(U));
    std::memcpy(param + first, saved + first, size_t(end - begin) * sizeof(U));
    return;
  }
  alignas(64) U values[wsn::kBlock], kept[wsn::kBlock];
  alignas(64) uint8_t frozen[wsn::kBlock];
  for (int64_t i = begin; i < end; i += wsn::kBlock) {
    const int64_t n = std::min(wsn::kBlock, end - i);
    unpack_block(bits + i / 8, n, frozen);
    if (std::none_of(frozen, frozen + n, [](uint8_t flag) { return flag != 0; })) continue;
    std::memcpy(values, param + i * int64_t(sizeof(U)), size_t(n) * sizeof(U));
    std::memcpy(kept, saved + i * int64_t(sizeof(U)), size_t(n) * sizeof(U));
    for (int64_t j = 0; j < n; ++j) {
      const U mask = U(-U(frozen[j]));
      values[j] = U((kept[j] & mask) | (values[j] & ~mask));
    }
    std::memcpy(param + i * int64_t(sizeof(U)), values, size_t(n) * sizeof(U));
  }
}

using Restore = void (*)(char *, const char *, const uint8_t *, int64_t, int64_t);

Restore restore_of(const wsn_restore_item &t) {
  switch (t.itemsize) {
    case 1: return restore<uint8_t>;
    case 2: return restore<uint16_t>;
    case 4: return restore<uint32_t>;
    case 8: return restore<uint64_t>;
    default: return nullptr;
  }
}

}  // namespace

int wsn_abi_version(void) { return WSN_ABI_VERSION; }

const char *wsn_error_message(int code) {
  switch (code) {
    case WSN_OK: return "no error";
    case WSN_ERROR_NULL: return "a pointer is NULL although its size is not 0";
    case WSN_ERROR_SIZE: return "a size is negative, or zero where there must be an element";
    case WSN_ERROR_THREADS: return "num_threads is less than 1";
    case WSN_ERROR_DTYPE: return "the dtype is unknown, or the function does not have it";
    case WSN_ERROR_RULE: return "the rule is unknown";
    case WSN_ERROR_RANK: return "the rank is not in [0, n)";
    case WSN_ERROR_MEMORY: return "no memory for the workspace";
    case WSN_ERROR_STORAGE: return "the storage of running means is unknown";
    default: return "unknown error code";
  }
}

int wsn_pack_bits(const uint8_t *mask, int64_t n, uint8_t *packed, int num_threads) {
  if (const int code = check(n, num_threads, mask, packed)) return code;
  parallel_for(n, 1, num_threads, [=](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) packed[i / 8] = gather_bits(nonzero_bytes(load64(mask + i)));
    if (i == end) return;
    uint8_t tail[8] = {};
    std::memcpy(tail, mask + i, size_t(end - i));
    packed[i / 8] = gather_bits(nonzero_bytes(load64(tail)));
  });
  return WSN_OK;
}

int wsn_unpack_bits(const uint8_t *packed, int64_t n, uint8_t *mask, int num_threads) {
  if (const int code = check(n, num_threads, packed, mask)) return code;
  parallel_for(n, 1, num_threads,
               [=](int64_t begin, int64_t end) { unpack_block(packed + begin / 8, end - begin, mask + begin); });
  return WSN_OK;
}

int wsn_or_bits(uint8_t *dst, const uint8_t *src, int64_t nbytes, int num_threads) {
  if (const int code = check(nbytes, num_threads, dst, src)) return code;
  parallel_for(nbytes, 3, num_threads, [=](int64_t begin, int64_t end) {
    or_bytes(dst + begin, src + begin, end - begin);
  });
  return WSN_OK;
}

int wsn_union_bits(const uint8_t *packed, int64_t rows, int64_t nbytes, uint8_t *out, int num_threads) {
  if (rows < 1) return WSN_ERROR_SIZE;
  if (const int code = check(nbytes, num_threads, packed, out)) return code;
  const auto kernel = wsn::kernels().unite;
  parallel_for(nbytes, rows + 1, num_threads,
               [=](int64_t begin, int64_t end) { kernel(packed, rows, nbytes, begin, end, out); });
  return WSN_OK;
}

int wsn_popcount_bits(const uint8_t *packed, int64_t nbytes, int64_t *out, int num_threads) {
  if (const int code = check(nbytes, num_threads, packed)) return code;
  if (out == nullptr) return WSN_ERROR_NULL;
  std::atomic<int64_t> total{0};
  parallel_for(nbytes, 1, num_threads, [=, &total](int64_t begin, int64_t end) {
    uint64_t count = 0;
    for (; end - begin >= 8; begin += 8) count += popcount64(load64(packed + begin));
    for (; begin < end; ++begin) count += popcount64(packed[begin]);
    total += int64_t(count);
  });
  *out = total;
  return WSN_OK;
}

int wsn_restore_frozen(void *param, const void *saved, const uint8_t *union_mask, int itemsize, int64_t n,
                       int num_threads) {
  if (const int code = check(n, num_threads, union_mask)) return code;
  const wsn_restore_item item = {param, saved, union_mask, itemsize, n};
  return wsn_restore_frozen_many(&item, 1, num_threads);
}

int wsn_restore_frozen_many(const wsn_restore_item *items, int64_t count, int num_threads) {
  if (const int code = check(count, num_threads, items)) return code;
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const wsn_restore_item &t = items[i];
    if (const int code = check(t.n, 1, t.param, t.saved)) return code;
    if (restore_of(t) == nullptr) return WSN_ERROR_DTYPE;
    bytes += 2 * t.itemsize * t.n;
  }
  parallel_for_all(
      count, bytes, num_threads, [&](int64_t i) { return items[i].n; },
      [&](int64_t i, int64_t begin, int64_t end) {
        const wsn_restore_item &t = items[i];
        restore_of(t)(static_cast<char *>(t.param), static_cast<const char *>(t.saved), t.union_mask, begin, end);
      });
  return WSN_OK;
}
