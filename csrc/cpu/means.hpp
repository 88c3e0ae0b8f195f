// Running means in fewer bytes, a block at a time. wsn_fast/backends/moments.py specifies every bit. In an unnamed
// namespace, so that each instruction set gets its own copy.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "numbers.hpp"
#include "parallel.hpp"

namespace {

constexpr int64_t kScaleBlock = WSN_MEANS_BLOCK;
constexpr uint32_t kAlong = 0xC13FA9A9, kOnward = 0x91E10DA5;
constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kNan = 0x7fc00000;
constexpr int32_t kLeastNormal = 0x00800000, kLeastSecond = 0x01000000;

template <bool kSigned>
struct Code {
  static constexpr int parts = 4;  // from the lowest up
  static constexpr int shift[parts] = {22, 21, 20, 19};
  static constexpr int32_t steps[parts] = {kSigned ? 17 : 20, kSigned ? 20 : 40, kSigned ? 40 : 64, kSigned ? 48 : 128};
  static constexpr int32_t first[parts] = {1, 1 + steps[0], 1 + steps[0] + steps[1],
                                           1 + steps[0] + steps[1] + steps[2]};
  static constexpr int32_t top = first[3] + steps[3];
  static constexpr int32_t infinity = kSigned ? 127 : 254, nan = kSigned ? 128 : 255, least = kSigned ? 22 : 37;
  int32_t start[parts];

  explicit Code(int32_t exponent) {
    int32_t upper = (exponent + 1) << 23;
    for (int k = parts - 1; k >= 0; --k) start[k] = upper -= steps[k] << shift[k];
  }

  static int32_t bounded(int32_t exponent) { return exponent < least ? least : exponent > 253 ? 253 : exponent; }

  // The steps of a part are larger, in bits of a float, than those of the part above. So a position is the largest of
  // those that the parts would give, and a magnitude the smallest.
  int32_t position(int32_t a, uint32_t r) const {
    int32_t p = 0;
    for (int k = 0; k < parts; ++k) {
      const int32_t inside = first[k] + ((a - start[k] + int32_t(r >> (32 - shift[k]))) >> shift[k]);
      p = p < inside ? inside : p;
    }
    p = p < top ? p : top;
    return a >= start[0] ? p : !kSigned && a > 0 ? 1 : 0;
  }

  uint32_t magnitude(int32_t p) const {
    uint32_t a = ~uint32_t(0);
    for (int k = 0; k < parts; ++k) {
      const uint32_t inside = uint32_t(start[k]) + (uint32_t(p - first[k]) << shift[k]);
      a = inside < a ? inside : a;
    }
    return p > 0 ? a : 0;
  }
};

template <bool kSigned>
void decode_8bit(const uint8_t *codes, float scale, int64_t n, float *out) {
  using C = Code<kSigned>;
  const C code(C::bounded(bits_as<int32_t>(scale) >> 23 & 0xff));
  for (int64_t j = 0; j < n; ++j) {
    const int32_t whole = codes[j], p = kSigned ? whole & 0x7f : whole;
    uint32_t bits = code.magnitude(p);
    bits = p == C::infinity ? uint32_t(kInfinity) : bits;
    if (kSigned) bits |= uint32_t(whole & 0x80) << 24;
    bits = whole == C::nan ? uint32_t(kNan) : bits;
    put(out, j, bits);
  }
}

// Returns the scale. r is the dither of the first element.
template <bool kSigned>
float encode_8bit(const float *values, uint32_t r, int64_t n, uint8_t *codes) {
  using C = Code<kSigned>;
  int32_t most = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t a = at<int32_t>(values, j) & kMagnitude, finite = a < kInfinity ? a : 0;
    most = most < finite ? finite : most;
  }
  const int32_t exponent = C::bounded(most >> 23);
  const C code(exponent);
  for (int64_t j = 0; j < n; ++j) {
    const int32_t bits = at<int32_t>(values, j), a = bits & kMagnitude;
    int32_t p = code.position(a, r + uint32_t(j) * kAlong);
    p = a == kInfinity ? C::infinity : p;
    if (kSigned) p |= (bits < 0) & (p > 0) ? 0x80 : 0;
    codes[j] = uint8_t(a > kInfinity ? C::nan : p);
  }
  return bits_as<float>(exponent << 23);
}

void decode_bfloat16(const void *values, int64_t n, float *out) {
  for (int64_t j = 0; j < n; ++j) put(out, j, uint32_t(at<uint16_t>(values, j)) << 16);
}

template <bool kSigned>
void encode_bfloat16(const float *values, uint32_t r, int64_t n, void *out) {
  for (int64_t j = 0; j < n; ++j) {
    const int32_t bits = at<int32_t>(values, j), a = bits & kMagnitude;
    const uint32_t up = r + uint32_t(j) * kAlong;
    const int32_t rounded = int32_t((uint32_t(a) + (up >> 16)) >> 16);
    int32_t b = rounded < 0x7f7f ? rounded : 0x7f7f;
    if (kSigned)
      b = a >= kLeastNormal ? b : 0;
    else
      b = a >= kLeastSecond ? b : a > 0 ? kLeastSecond >> 16 : 0;
    b = a < kInfinity ? b : a == kInfinity ? 0x7f80 : 0x7fc0;
    if (kSigned) b |= int32_t(uint32_t(bits) >> 16 & 0x8000);
    put(out, j, uint16_t(b));
  }
}

template <bool kSigned>
void decode_means(const wsn::Means &means, int64_t i, int64_t n, float *out) {
  if (means.storage == WSN_MEANS_BFLOAT16)
    return decode_bfloat16(static_cast<const uint16_t *>(means.values) + i, n, out);
  const uint8_t *const codes = static_cast<const uint8_t *>(means.values) + i;
  for (int64_t j = 0; j < n; j += kScaleBlock) {
    const int64_t length = n - j < kScaleBlock ? n - j : kScaleBlock;
    decode_8bit<kSigned>(codes + j, at<float>(means.scales, (i + j) / kScaleBlock), length, out + j);
  }
}

template <bool kSigned>
void encode_means(const float *values, int64_t i, int64_t n, uint32_t update, const wsn::Means &means) {
  const uint32_t r = uint32_t(i) * kAlong + update * kOnward;
  if (means.storage == WSN_MEANS_BFLOAT16)
    return encode_bfloat16<kSigned>(values, r, n, static_cast<uint16_t *>(means.values) + i);
  uint8_t *const codes = static_cast<uint8_t *>(means.values) + i;
  for (int64_t j = 0; j < n; j += kScaleBlock) {
    const int64_t length = n - j < kScaleBlock ? n - j : kScaleBlock;
    const float scale = encode_8bit<kSigned>(values + j, r + uint32_t(j) * kAlong, length, codes + j);
    put(means.scales, (i + j) / kScaleBlock, scale);
  }
}

// The means of one block as floats: where they lie, or in buffers between load and store.
template <class Step>
class MeansBlock {
 public:
  explicit MeansBlock(const wsn::Update<Step> &update) : update_(update), block_(update) {}

  const wsn::Update<Step> &load(int64_t i, int64_t n) {
    if (update_.first.storage == WSN_MEANS_PLAIN || update_.first.values == nullptr) return update_;
    decode_means<true>(update_.first, i, n, first_);
    block_.first.values = first_;
    if (update_.second.values != nullptr) {
      decode_means<false>(update_.second, i, n, second_);
      block_.second.values = second_;
    }
    block_.origin = i;
    return block_;
  }

  void store(int64_t i, int64_t n) const {
    if (update_.first.storage == WSN_MEANS_PLAIN || update_.first.values == nullptr) return;
    encode_means<true>(first_, i, n, update_.count, update_.first);
    if (update_.second.values != nullptr) encode_means<false>(second_, i, n, update_.count, update_.second);
  }

 private:
  const wsn::Update<Step> &update_;
  wsn::Update<Step> block_;
  alignas(64) float first_[wsn::kBlock], second_[wsn::kBlock];
};

}  // namespace
