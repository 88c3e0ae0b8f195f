// Running means in fewer bytes, a block at a time. wsn_fast/backends/moments.py specifies every bit. In an unnamed
// namespace, so that each instruction set gets its own copy.
#pragma once

#include <cstdint>

#include "codes.hpp"
#include "kernels.hpp"
#include "numbers.hpp"
#include "parallel.hpp"

namespace {

constexpr int32_t kLeastNormal = 0x00800000, kLeastSecond = 0x01000000;

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
