// Scores as unsigned integers in the same order. Integers throughout, so that denormals stay what they are.
#pragma once

#include <stdint.h>

template <class Bits_, uint32_t kInfinity_>
struct Format {
  using Bits = Bits_;
  static constexpr uint32_t kInfinity = kInfinity_;
};
using Float32 = Format<uint32_t, 0x7f800000>;
using BFloat16 = Format<uint16_t, 0x7f80>;
using Float16 = Format<uint16_t, 0x7c00>;

constexpr int kDigit = 11;  // bits that are counted at a time

// Keys of kBits bits: |S| without its sign bit, or S. All NaNs are the largest key, both zeros the same.
template <class F, bool kMagnitude>
struct Key {
  static constexpr int kBits = 8 * sizeof(typename F::Bits) - kMagnitude;
  static constexpr int kDigits = (kBits + kDigit - 1) / kDigit;
  static constexpr uint32_t kMax = ~0u >> (32 - kBits);
  static constexpr uint32_t kSign = 1u << (8 * sizeof(typename F::Bits) - 1);

  static __device__ __forceinline__ uint32_t of(uint32_t bits) {
    const uint32_t magnitude = bits & (kSign - 1);
    if (magnitude > F::kInfinity) return kMax;
    if (kMagnitude) return magnitude;
    return bits & kSign ? kSign - magnitude : kSign + magnitude;
  }

  static __device__ __forceinline__ typename F::Bits to(uint32_t key) {
    if (kMagnitude) return static_cast<typename F::Bits>(key);
    return static_cast<typename F::Bits>(key < kSign ? kSign | (kSign - key) : key - kSign);
  }
};
