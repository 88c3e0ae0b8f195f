// The 8-bit codes of running means, a block at a time. wsn_fast/backends/moments.py specifies every bit. In an unnamed
// namespace, so that each instruction set gets its own copy; whole blocks have loops of their own for AVX2 and AVX-512.
#pragma once

#include <cstdint>

#include "intrinsics.hpp"
#include "numbers.hpp"
#include "wsn_fast.h"

namespace {

constexpr int64_t kScaleBlock = WSN_MEANS_BLOCK;
constexpr uint32_t kAlong = 0xC13FA9A9, kOnward = 0x91E10DA5;
constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kNan = 0x7fc00000;
constexpr int32_t kGreatest = 253;  // biased exponent of a scale

template <bool kSigned>
struct Code {
  static constexpr int parts = 4;  // from the lowest up
  static constexpr int shift[parts] = {22, 21, 20, 19};
  static constexpr int32_t steps[parts] = {kSigned ? 17 : 20, kSigned ? 20 : 40, kSigned ? 40 : 64, kSigned ? 48 : 128};
  static constexpr int32_t first[parts] = {1, 1 + steps[0], 1 + steps[0] + steps[1],
                                           1 + steps[0] + steps[1] + steps[2]};
  static constexpr int32_t top = first[3] + steps[3];
  static constexpr int32_t infinity = kSigned ? 127 : 254, nan = kSigned ? 128 : 255, least = kSigned ? 22 : 37;

  // Where a part starts, in bits of a float, for the biased exponent of a scale.
  static constexpr int32_t start(int part, int32_t exponent) {
    int32_t at = (exponent + 1) * (1 << 23);
    for (int k = parts - 1; k >= part; --k) at -= steps[k] << shift[k];
    return at;
  }
  static constexpr int part_of(int32_t p) { return p >= first[3] ? 3 : p >= first[2] ? 2 : p >= first[1] ? 1 : 0; }
  static int32_t bounded(int32_t exponent) {
    return exponent < least ? least : exponent > kGreatest ? kGreatest : exponent;
  }
};

// --- any number of elements, for the compiler to vectorise

// The steps of a part are larger, in bits of a float, than those of the part above. So a position is the largest of
// those that the parts would give, and a magnitude the smallest.
template <bool kSigned>
void decode_any(const uint8_t *codes, int32_t exponent, int64_t n, float *out) {
  using C = Code<kSigned>;
  uint32_t ahead[C::parts];  // (p + ahead) << shift
  for (int k = 0; k < C::parts; ++k)
    ahead[k] = uint32_t(C::start(k, exponent) >> C::shift[k]) - uint32_t(C::first[k]);
  for (int64_t j = 0; j < n; ++j) {
    const int32_t whole = codes[j], p = kSigned ? whole & 0x7f : whole;
    uint32_t bits = ~uint32_t(0);
    for (int k = 0; k < C::parts; ++k) {
      const uint32_t inside = (uint32_t(p) + ahead[k]) << C::shift[k];
      bits = inside < bits ? inside : bits;
    }
    bits = p > 0 ? bits : 0;
    bits = p == C::infinity ? uint32_t(kInfinity) : bits;
    if (kSigned) bits |= uint32_t(whole & 0x80) << 24;
    bits = whole == C::nan ? uint32_t(kNan) : bits;
    put(out, j, bits);
  }
}

// Returns the scale. r is the dither of the first element.
template <bool kSigned>
float encode_any(const float *values, uint32_t r, int64_t n, uint8_t *codes) {
  using C = Code<kSigned>;
  int32_t most = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t a = at<int32_t>(values, j) & kMagnitude, finite = a < kInfinity ? a : 0;
    most = most < finite ? finite : most;
  }
  const int32_t exponent = C::bounded(most >> 23), lowest = C::start(0, exponent);
  int32_t ahead[C::parts];
  for (int k = 0; k < C::parts; ++k) ahead[k] = C::first[k] - (C::start(k, exponent) >> C::shift[k]);
  for (int64_t j = 0; j < n; ++j) {
    const int32_t bits = at<int32_t>(values, j), a = bits & kMagnitude;
    const uint32_t up = r + uint32_t(j) * kAlong;
    int32_t p = 0;
    for (int k = 0; k < C::parts; ++k) {
      const int32_t inside = int32_t((uint32_t(a) + (up >> (32 - C::shift[k]))) >> C::shift[k]) + ahead[k];
      p = p < inside ? inside : p;
    }
    p = p < C::top ? p : C::top;
    p = a >= lowest ? p : !kSigned && a > 0 ? 1 : 0;
    p = a == kInfinity ? C::infinity : p;
    if (kSigned) p |= ((bits < 0) & (p > 0)) ? 0x80 : 0;
    codes[j] = uint8_t(a > kInfinity ? C::nan : p);
  }
  return bits_as<float>(exponent << 23);
}

// --- whole blocks

#if defined(__AVX2__)

// A block's parts as a table, by how many octaves (SIGNED) or pairs of them (UNSIGNED) a number lies above the lowest
// part; that one has the place 0, however far it reaches down.
template <bool kSigned>
struct Octaves {
  using C = Code<kSigned>;
  static constexpr int width = kSigned ? 23 : 24;
  static constexpr int32_t below = kSigned ? 13 : 27;  // octaves from the scale down to the place 0
  alignas(64) int32_t shift[16] = {}, first[16] = {};
  constexpr Octaves() {
    for (int place = 0; place < 16; ++place) {
      const int32_t octave = (place << (width - 23)) - below;  // above the scale
      int part = 0;
      for (int k = 1; k < C::parts; ++k) part = octave * (1 << 23) >= C::start(k, 0) ? k : part;
      shift[place] = C::shift[part];
      first[place] = C::first[part] - (C::start(part, 0) >> C::shift[part]);  // for the exponent 0
    }
  }
};
template <bool kSigned>
constexpr Octaves<kSigned> kOctaves{};
static_assert(kOctaves<true>.shift[0] == 22 && kOctaves<true>.shift[1] == 21 && kOctaves<true>.shift[11] == 19, "");
static_assert(kOctaves<false>.shift[0] == 22 && kOctaves<false>.shift[1] == 21 && kOctaves<false>.shift[10] == 19, "");

#endif

#if defined(__AVX512BW__)

// The upper halves of the floats of all positions, for the exponent 0; their lower halves are 0.
template <bool kSigned>
struct Uppers {
  using C = Code<kSigned>;
  static constexpr int count = kSigned ? 128 : 256;
  alignas(64) uint16_t upper[count] = {};
  constexpr Uppers() {
    for (int32_t p = 1; p <= C::top; ++p) {
      const int k = C::part_of(p);
      upper[p] = uint16_t((C::start(k, 0) + ((p - C::first[k]) * (1 << C::shift[k]))) >> 16);
    }
    upper[C::infinity] = kInfinity >> 16;
    if (!kSigned) upper[C::nan] = kNan >> 16;
  }
};
template <bool kSigned>
constexpr Uppers<kSigned> kUppers{};

// The table of one block, in registers.
template <bool kSigned>
class Decoder {
  using C = Code<kSigned>;
  static constexpr int registers = Uppers<kSigned>::count / 32;

 public:
  explicit Decoder(int32_t exponent) {
    const __m512i up = _mm512_set1_epi16(short(exponent << 7));
    for (int k = 0; k < registers; ++k) {
      const __m512i upper = _mm512_load_si512(kUppers<kSigned>.upper + 32 * k);
      const __mmask32 special = (k == 0 ? 1u : 0u) | (k == registers - 1 ? (kSigned ? 1u << 31 : 3u << 30) : 0u);
      table_[k] = _mm512_mask_add_epi16(upper, ~special, upper, up);
    }
  }

  // The upper halves of 32 floats.
  __m512i uppers(const uint8_t *codes) const {
    const __m512i whole = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)));
    const __m512i low = _mm512_permutex2var_epi16(table_[0], whole, table_[1]);
    const __m512i high = _mm512_permutex2var_epi16(table_[2], whole, table_[3]);
    const __m512i half = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(whole, _mm512_set1_epi16(0x40)), low, high);
    if constexpr (kSigned) {
      const __m512i with_sign =  // half | (whole << 8 & 0x8000)
          _mm512_ternarylogic_epi32(half, _mm512_slli_epi16(whole, 8), _mm512_set1_epi16(-0x8000), 0xf8);
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(whole, _mm512_set1_epi16(C::nan));
      return _mm512_mask_mov_epi16(with_sign, nan, _mm512_set1_epi16(kNan >> 16));
    } else {
      const __m512i low2 = _mm512_permutex2var_epi16(table_[4], whole, table_[5]);
      const __m512i high2 = _mm512_permutex2var_epi16(table_[6], whole, table_[7]);
      const __m512i half2 = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(whole, _mm512_set1_epi16(0x40)), low2, high2);
      return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(whole, _mm512_set1_epi16(0x80)), half, half2);
    }
  }

 private:
  __m512i table_[registers < 4 ? 4 : registers];
};

inline __m512i widened(__m256i uppers) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(uppers), 16); }

template <bool kSigned>
void decode_block(const uint8_t *codes, int32_t exponent, float *out) {
  const Decoder<kSigned> decoder(exponent);
  for (int64_t j = 0; j < kScaleBlock; j += 32) {
    const __m512i uppers = decoder.uppers(codes + j);
    _mm512_storeu_si512(out + j, widened(_mm512_castsi512_si256(uppers)));
    _mm512_storeu_si512(out + j + 16, widened(_mm512_extracti64x4_epi64(uppers, 1)));
  }
}

WSN_INLINE __m512i magnitudes_of(__m512i bits) { return _mm512_and_si512(bits, _mm512_set1_epi32(kMagnitude)); }

// `largest` holds, somewhere, the largest of all magnitudes.
template <bool kSigned>
float encode_block(const float *values, __m512i largest, uint32_t r, uint8_t *codes) {
  using C = Code<kSigned>;
  using O = Octaves<kSigned>;
  const int32_t most = _mm512_reduce_max_epi32(largest) >> 23;
  if (most > kGreatest) return encode_any<kSigned>(values, r, kScaleBlock, codes);  // rare: too large, or not finite
  const int32_t exponent = most < C::least ? C::least : most;

  const __m512i shifts = _mm512_load_si512(kOctaves<kSigned>.shift);
  const __m512i bits = _mm512_sub_epi32(_mm512_set1_epi32(23), shifts);
  const __m512i firsts = _mm512_sub_epi32(_mm512_load_si512(kOctaves<kSigned>.first),
                                          _mm512_sllv_epi32(_mm512_set1_epi32(exponent), bits));
  const __m512i base = _mm512_set1_epi32((exponent - O::below) << 23);
  const __m512i lowest = _mm512_set1_epi32(C::start(0, exponent));
  const __m512i along = _mm512_set1_epi32(int(16 * kAlong));
  alignas(64) static constexpr uint32_t kSteps[16] = {
      0 * kAlong, 1 * kAlong, 2 * kAlong,  3 * kAlong,  4 * kAlong,  5 * kAlong,  6 * kAlong,  7 * kAlong,
      8 * kAlong, 9 * kAlong, 10 * kAlong, 11 * kAlong, 12 * kAlong, 13 * kAlong, 14 * kAlong, 15 * kAlong};
  __m512i dither = _mm512_add_epi32(_mm512_set1_epi32(int(r)), _mm512_load_si512(kSteps));
  for (int64_t j = 0; j < kScaleBlock; j += 16) {
    const __m512i x = _mm512_loadu_si512(values + j), a = magnitudes_of(x);
    const __m512i place =
        _mm512_max_epi32(_mm512_srai_epi32(_mm512_sub_epi32(a, base), O::width), _mm512_setzero_si512());
    const __m512i shift = _mm512_permutexvar_epi32(place, shifts), first = _mm512_permutexvar_epi32(place, firsts);
    const __m512i up = _mm512_srlv_epi32(dither, _mm512_sub_epi32(_mm512_set1_epi32(32), shift));
    __m512i p = _mm512_add_epi32(_mm512_srlv_epi32(_mm512_add_epi32(a, up), shift), first);
    if constexpr (kSigned) {
      const __mmask16 coded = _mm512_cmpge_epi32_mask(a, lowest);
      p = _mm512_maskz_ternarylogic_epi32(coded, p, _mm512_srli_epi32(x, 24), _mm512_set1_epi32(0x80), 0xf8);
    } else {
      p = _mm512_maskz_max_epi32(_mm512_test_epi32_mask(a, a), p, _mm512_set1_epi32(1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + j), _mm512_cvtepi32_epi8(p));
    dither = _mm512_add_epi32(dither, along);
  }
  return bits_as<float>(exponent << 23);
}

template <bool kSigned>
float encode_block(const float *values, uint32_t r, uint8_t *codes) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t j = 0; j < kScaleBlock; j += 16)
    largest = _mm512_max_epi32(largest, magnitudes_of(_mm512_loadu_si512(values + j)));
  return encode_block<kSigned>(values, largest, r, codes);
}

#elif defined(__AVX2__)

// Upper halves of 16 floats at a time, as decode_any finds them.
template <bool kSigned>
void decode_block(const uint8_t *codes, int32_t exponent, float *out) {
  using C = Code<kSigned>;
  const __m256i zero = _mm256_setzero_si256();
  __m256i ahead[C::parts];
  for (int k = 0; k < C::parts; ++k)
    ahead[k] = _mm256_set1_epi16(short((C::start(k, exponent) >> C::shift[k]) - C::first[k]));
  for (int64_t j = 0; j < kScaleBlock; j += 16) {
    const __m256i whole = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + j)));
    const __m256i p = kSigned ? _mm256_and_si256(whole, _mm256_set1_epi16(0x7f)) : whole;
    __m256i upper = _mm256_slli_epi16(_mm256_add_epi16(p, ahead[0]), C::shift[0] - 16);
    for (int k = 1; k < C::parts; ++k)
      upper = _mm256_min_epu16(upper, _mm256_slli_epi16(_mm256_add_epi16(p, ahead[k]), C::shift[k] - 16));
    upper = _mm256_andnot_si256(_mm256_cmpeq_epi16(p, zero), upper);
    upper = _mm256_blendv_epi8(upper, _mm256_set1_epi16(kInfinity >> 16),
                               _mm256_cmpeq_epi16(p, _mm256_set1_epi16(C::infinity)));
    if (kSigned)
      upper = _mm256_or_si256(upper, _mm256_and_si256(_mm256_slli_epi16(whole, 8), _mm256_set1_epi16(-0x8000)));
    upper = _mm256_blendv_epi8(upper, _mm256_set1_epi16(kNan >> 16),
                               _mm256_cmpeq_epi16(whole, _mm256_set1_epi16(C::nan)));
    upper = _mm256_permute4x64_epi64(upper, 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + j), _mm256_unpacklo_epi16(zero, upper));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + j + 8), _mm256_unpackhi_epi16(zero, upper));
  }
}

// 16 numbers below 256 as a table of bytes, in both halves.
inline __m256i byte_table(__m256i low, __m256i high) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  return _mm256_broadcastsi128_si256(
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Eight at a time. Positions are below 256, so the lowest byte of a part's first one is enough.
template <bool kSigned>
class Encoder {
  using C = Code<kSigned>;
  using O = Octaves<kSigned>;

 public:
  Encoder(int32_t exponent, uint32_t r)
      : base_(_mm256_set1_epi32((exponent - O::below) << 23)), lowest_(_mm256_set1_epi32(C::start(0, exponent))),
        dither_(_mm256_add_epi32(_mm256_set1_epi32(int(r)),
                                 _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                    _mm256_set1_epi32(int(kAlong))))) {
    __m256i shift[2], first[2];
    for (int half = 0; half < 2; ++half) {
      shift[half] = load(kOctaves<kSigned>.shift + 8 * half);
      const __m256i bits = _mm256_sub_epi32(_mm256_set1_epi32(23), shift[half]);
      const __m256i ahead = _mm256_sub_epi32(load(kOctaves<kSigned>.first + 8 * half),
                                             _mm256_sllv_epi32(_mm256_set1_epi32(exponent), bits));
      first[half] = _mm256_and_si256(ahead, _mm256_set1_epi32(0xff));
    }
    shifts_ = byte_table(shift[0], shift[1]), firsts_ = byte_table(first[0], first[1]);
  }

  // The codes of the next eight values.
  WSN_INLINE __m256i codes(const float *values) {
    const __m256i x = load(values), a = _mm256_and_si256(x, _mm256_set1_epi32(kMagnitude));
    const __m256i place =
        _mm256_max_epi32(_mm256_srai_epi32(_mm256_sub_epi32(a, base_), O::width), _mm256_setzero_si256());
    const __m256i lowest_byte = _mm256_or_si256(place, _mm256_set1_epi32(int(0x80808000)));
    const __m256i shift = _mm256_shuffle_epi8(shifts_, lowest_byte), first = _mm256_shuffle_epi8(firsts_, lowest_byte);
    const __m256i up = _mm256_srlv_epi32(dither_, _mm256_sub_epi32(_mm256_set1_epi32(32), shift));
    dither_ = _mm256_add_epi32(dither_, _mm256_set1_epi32(int(8 * kAlong)));
    __m256i p = _mm256_add_epi32(_mm256_srlv_epi32(_mm256_add_epi32(a, up), shift), first);
    p = _mm256_and_si256(p, _mm256_set1_epi32(0xff));
    const __m256i below = _mm256_cmpgt_epi32(lowest_, a);
    if (kSigned) {
      p = _mm256_or_si256(p, _mm256_and_si256(_mm256_srli_epi32(x, 24), _mm256_set1_epi32(0x80)));
      return _mm256_andnot_si256(below, p);
    }
    p = _mm256_blendv_epi8(p, _mm256_set1_epi32(1), below);
    return _mm256_andnot_si256(_mm256_cmpeq_epi32(a, _mm256_setzero_si256()), p);
  }

  static WSN_INLINE __m256i load(const void *data) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(data));
  }

 private:
  const __m256i base_, lowest_;
  __m256i dither_, shifts_, firsts_;
};

template <bool kSigned>
float encode_block(const float *values, uint32_t r, uint8_t *codes) {
  using E = Encoder<kSigned>;
  __m256i largest = _mm256_setzero_si256();
  for (int64_t j = 0; j < kScaleBlock; j += 8)
    largest = _mm256_max_epi32(largest, _mm256_and_si256(E::load(values + j), _mm256_set1_epi32(kMagnitude)));
  int32_t lanes[8], most = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(lanes), largest);
  for (const int32_t lane : lanes) most = most < lane ? lane : most;
  most >>= 23;
  if (most > kGreatest) return encode_any<kSigned>(values, r, kScaleBlock, codes);  // rare: too large, or not finite
  const int32_t exponent = most < Code<kSigned>::least ? Code<kSigned>::least : most;
  E encoder(exponent, r);
  for (int64_t j = 0; j < kScaleBlock; j += 32) {
    __m256i part[4];
    for (int k = 0; k < 4; ++k) part[k] = encoder.codes(values + j + 8 * k);
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_packus_epi32(part[0], part[1]), _mm256_packus_epi32(part[2], part[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + j), _mm256_permutevar8x32_epi32(bytes, order));
  }
  return bits_as<float>(exponent << 23);
}

#else

template <bool kSigned>
void decode_block(const uint8_t *codes, int32_t exponent, float *out) {
  decode_any<kSigned>(codes, exponent, kScaleBlock, out);
}

template <bool kSigned>
float encode_block(const float *values, uint32_t r, uint8_t *codes) {
  return encode_any<kSigned>(values, r, kScaleBlock, codes);
}

#endif

template <bool kSigned>
void decode_8bit(const uint8_t *codes, float scale, int64_t n, float *out) {
  const int32_t exponent = Code<kSigned>::bounded(bits_as<int32_t>(scale) >> 23 & 0xff);
  if (n == kScaleBlock)
    decode_block<kSigned>(codes, exponent, out);
  else
    decode_any<kSigned>(codes, exponent, n, out);
}

template <bool kSigned>
float encode_8bit(const float *values, uint32_t r, int64_t n, uint8_t *codes) {
  if (n == kScaleBlock) return encode_block<kSigned>(values, r, codes);
  return encode_any<kSigned>(values, r, n, codes);
}

}  // namespace
