// Eight mask bytes at a time. In an unnamed namespace, so that each instruction set gets its own copy.
#pragma once

#include <cstdint>

namespace {

constexpr uint64_t kOnes = 0x0101010101010101;  // 1 in each byte

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

// n mask bytes of 0 or 1 to their bits, and back.
inline void pack_block(const uint8_t *flags, int64_t n, uint8_t *packed) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) packed[i / 8] = gather_bits(load64(flags + i));
  if (i == n) return;
  uint8_t last = 0;
  for (int64_t j = i; j < n; ++j) last = uint8_t(last | flags[j] << (j - i));
  packed[i / 8] = last;
}

inline void unpack_block(const uint8_t *packed, int64_t n, uint8_t *flags) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store64(flags + i, scatter_bits(packed[i / 8]));
  for (int64_t j = i; j < n; ++j) flags[j] = uint8_t(packed[i / 8] >> (j - i) & 1);
}

}  // namespace
