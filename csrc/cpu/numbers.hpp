// The four dtypes as bits and as numbers. In an unnamed namespace, so that each instruction set gets its own copy.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "wsn_fast.h"

// For what stands inside of loops: a compiler that has enough of inlining leaves a call there, and no vector loop.
#if defined(_MSC_VER)
#define WSN_INLINE __forceinline
#else
#define WSN_INLINE inline __attribute__((always_inline))
#endif

namespace {

template <class T>
WSN_INLINE T at(const void *data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char *>(data) + i * int64_t(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
WSN_INLINE void put(void *data, int64_t i, T value) {
  std::memcpy(static_cast<char *>(data) + i * int64_t(sizeof(T)), &value, sizeof(T));
}

template <class To, class From>
WSN_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Bits: the unsigned integer of its size. Real: the type that its arithmetic is done in. decode is exact, encode rounds
// to nearest even.
template <int kDtype>
struct Number;

template <>
struct Number<WSN_FLOAT32> {
  using Bits = uint32_t;
  using Real = float;
  static WSN_INLINE float decode(uint32_t bits) { return bits_as<float>(bits); }
  static WSN_INLINE uint32_t encode(float x) { return bits_as<uint32_t>(x); }
};

template <>
struct Number<WSN_FLOAT64> {
  using Bits = uint64_t;
  using Real = double;
  static WSN_INLINE double decode(uint64_t bits) { return bits_as<double>(bits); }
  static WSN_INLINE uint64_t encode(double x) { return bits_as<uint64_t>(x); }
};

template <>
struct Number<WSN_BFLOAT16> {
  using Bits = uint16_t;
  using Real = float;
  static WSN_INLINE float decode(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }
  static WSN_INLINE uint16_t encode(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

template <>
struct Number<WSN_FLOAT16> {
  using Bits = uint16_t;
  using Real = float;
  static WSN_INLINE float decode(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fff, sign = uint32_t(bits & 0x8000) << 16;
    const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
    const uint32_t denormal = bits_as<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
    return bits_as<float>((magnitude < 0x400 ? denormal : normal) | sign);
  }
  static WSN_INLINE uint16_t encode(float x) {
    const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // 0.5 has the spacing of float16's denormals, so that the addition rounds to them.
    const uint32_t denormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t small = magnitude < 0x38800000 ? denormal : normal;
    return uint16_t((magnitude >= 0x477ff000 ? special : small) | (bits >> 16 & 0x8000));
  }
};

// a * b + c, fused as in PyTorch's vector code. Without such instructions the product of two
// floats is exact as a double.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
WSN_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
WSN_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
#else
WSN_INLINE float multiply_add(float a, float b, float c) { return float(double(a) * b + c); }
WSN_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

// x / divisor, rounded as that is, for many x: Markstein's theorem, with the reciprocal rounded to nearest. Infinities
// would become NaN.
template <class T>
struct Divisor {
  T divisor, reciprocal;
  explicit Divisor(T x) : divisor(x), reciprocal(1 / x) {}
  WSN_INLINE T divide(T x) const {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    const T quotient = x * reciprocal;
    const T corrected = multiply_add(multiply_add(-quotient, divisor, x), reciprocal, quotient);
    return quotient - quotient == 0 ? corrected : quotient;
#else
    return x / divisor;
#endif
  }
};

WSN_INLINE float root(float x) { return sqrtf(x); }
WSN_INLINE double root(double x) { return sqrt(x); }

}  // namespace
