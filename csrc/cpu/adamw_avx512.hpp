// The one-pass AdamW step of float32 tensors whose means are plain or in 8 bits, for AVX-512: the loops of kernels.inl
// by hand, and the next gate in the same loop. Every line rounds as the line there does, so the results are the same.
//
// Means in 8 bits are decoded for one block of a scale, updated in the first-level cache, and encoded; the block's
// largest magnitudes are found while they are in registers. Memory is asked for ahead of time, a little in every turn:
// hardware follows a stream to the end of a page only, and there are up to eight of them.
#pragma once

#if defined(__AVX512BW__)

#include "codes.hpp"
#include "intrinsics.hpp"
#include "kernels.hpp"
#include "numbers.hpp"

namespace {

constexpr int64_t kAheadOf = 1024;  // elements

WSN_INLINE void prefetch_line(const void *data) {
  _mm_prefetch(static_cast<const char *>(data), _MM_HINT_T0);
}

struct AdamWVectors {
  __m512 lerp, beta2, rest2, eps, size, shrink, divisor, reciprocal;
  __mmask16 near;

  explicit AdamWVectors(const wsn::AdamWStep &step)
      : lerp(_mm512_set1_ps(float(step.lerp < 0.5 ? step.lerp : step.lerp - 1))), beta2(_mm512_set1_ps(float(step.beta2))),
        rest2(_mm512_set1_ps(float(step.one_minus_beta2))), eps(_mm512_set1_ps(float(step.eps))),
        size(_mm512_set1_ps(float(-step.step_size))), shrink(_mm512_set1_ps(float(step.shrink))),
        divisor(_mm512_set1_ps(float(step.root_correction))),
        reciprocal(_mm512_set1_ps(1 / float(step.root_correction))), near(step.lerp < 0.5 ? 0xffff : 0) {}

  template <bool kPlain>
  WSN_INLINE __m512 after(__m512 before, __m512 g, __m512 *m, __m512 *v) const {
    *m = normal<kPlain>(_mm512_fmadd_ps(lerp, _mm512_sub_ps(g, *m), _mm512_mask_mov_ps(g, near, *m)));
    *v = normal<kPlain>(_mm512_add_ps(_mm512_mul_ps(*v, beta2), _mm512_mul_ps(_mm512_mul_ps(rest2, g), g)));
    const __m512 denominator = _mm512_add_ps(corrected(_mm512_sqrt_ps(*v)), eps);
    return _mm512_add_ps(_mm512_mul_ps(before, shrink), _mm512_div_ps(_mm512_mul_ps(size, *m), denominator));
  }

 private:
  template <bool kPlain>
  static WSN_INLINE __m512 normal(__m512 x) {
    if (!kPlain) return x;
    const __mmask16 tiny = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(x, tiny, _mm512_setzero_ps());
  }
  // Divisor::divide.
  WSN_INLINE __m512 corrected(__m512 x) const {
    const __m512 quotient = _mm512_mul_ps(x, reciprocal);
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_sub_ps(quotient, quotient), _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(
        quotient, finite, _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, divisor, x), reciprocal, quotient));
  }
};

// The two means of a parameter, in one block: where they lie.
template <bool kCoded>
class BlockMeans {
 public:
  explicit BlockMeans(const wsn::Update<wsn::AdamWStep> &update)
      : first_(static_cast<float *>(update.first.values)), second_(static_cast<float *>(update.second.values)) {}
  WSN_INLINE void load(int64_t i) { at_ = i; }
  WSN_INLINE void get(int64_t j, __m512 *m, __m512 *v) const {
    prefetch_line(first_ + at_ + j + kAheadOf), prefetch_line(second_ + at_ + j + kAheadOf);
    *m = _mm512_loadu_ps(first_ + at_ + j), *v = _mm512_loadu_ps(second_ + at_ + j);
  }
  WSN_INLINE void put(int64_t j, __m512 m, __m512 v) {
    _mm512_storeu_ps(first_ + at_ + j, m), _mm512_storeu_ps(second_ + at_ + j, v);
  }
  WSN_INLINE void store() const {}

 private:
  float *const first_, *const second_;
  int64_t at_ = 0;
};

// The same in 8 bits: in buffers between load and store.
template <>
class BlockMeans<true> {
 public:
  explicit BlockMeans(const wsn::Update<wsn::AdamWStep> &update) : update_(update) {}

  WSN_INLINE void load(int64_t i) {
    at_ = i;
    decode<true>(update_.first, first_), decode<false>(update_.second, second_);
    most_first_ = most_second_ = _mm512_setzero_si512();
  }
  WSN_INLINE void get(int64_t j, __m512 *m, __m512 *v) const {
    *m = _mm512_load_ps(first_ + j), *v = _mm512_load_ps(second_ + j);
  }
  WSN_INLINE void put(int64_t j, __m512 m, __m512 v) {
    _mm512_store_ps(first_ + j, m), _mm512_store_ps(second_ + j, v);
    most_first_ = _mm512_max_epi32(most_first_, magnitudes_of(_mm512_castps_si512(m)));
    most_second_ = _mm512_max_epi32(most_second_, magnitudes_of(_mm512_castps_si512(v)));
  }
  WSN_INLINE void store() const {
    const uint32_t r = uint32_t(at_) * kAlong + update_.count * kOnward;
    put_scale(update_.first, encode_block<true>(first_, most_first_, r, codes(update_.first)));
    put_scale(update_.second, encode_block<false>(second_, most_second_, r, codes(update_.second)));
  }

 private:
  WSN_INLINE uint8_t *codes(const wsn::Means &means) const { return static_cast<uint8_t *>(means.values) + at_; }
  WSN_INLINE void put_scale(const wsn::Means &means, float scale) const { means.scales[at_ / kScaleBlock] = scale; }
  template <bool kSigned>
  WSN_INLINE void decode(const wsn::Means &means, float *out) const {
    for (int64_t j = 0; j < kScaleBlock; j += 64) prefetch_line(codes(means) + kAheadOf + j);
    decode_8bit<kSigned>(codes(means), means.scales[at_ / kScaleBlock], kScaleBlock, out);
  }

  const wsn::Update<wsn::AdamWStep> &update_;
  int64_t at_ = 0;
  __m512i most_first_, most_second_;
  alignas(64) float first_[kScaleBlock], second_[kScaleBlock];
};

template <int kTransform>
WSN_INLINE __m512i keys_of(__m512 x, __m512i infinity) {
  const __m512i bits = _mm512_castps_si512(x), magnitude = magnitudes_of(bits);
  if (kTransform == WSN_MAGNITUDE) return magnitude;
  const __mmask16 negative = _mm512_movepi32_mask(bits) & _mm512_cmple_epi32_mask(magnitude, infinity);
  return _mm512_mask_sub_epi32(magnitude, negative, _mm512_setzero_si512(), magnitude);
}

// The gate of the next forward pass by a guess; see speculate_block.
template <int kTransform>
class NextBlock {
 public:
  explicit NextBlock(const wsn::Speculation *s)
      : speculation_(s), out_(s ? static_cast<float *>(s->gate.out) : nullptr),
        streams_(s && s->gate.streams && reinterpret_cast<uintptr_t>(out_) % 64 == 0) {
    if (!s) return;
    guess_ = _mm512_set1_epi32(int32_t(s->gate.tau));
    lo_ = _mm512_set1_epi32(int32_t(s->lo));
    span_ = _mm512_set1_epi32(int32_t(uint32_t(s->hi) - uint32_t(s->lo)));
  }

  WSN_INLINE void gate(int64_t i, __m512 weight, __m512 scores, __m512i infinity) {
    if (!speculation_) return;
    const __m512i key = keys_of<kTransform>(scores, infinity);
    const __m512 masked = _mm512_maskz_mov_ps(_mm512_cmpge_epi32_mask(key, guess_), weight);
    if (streams_)
      _mm512_stream_ps(out_ + i, masked);
    else
      prefetch_line(out_ + i + kAheadOf), _mm512_storeu_ps(out_ + i, masked);
    const __mmask16 same = _mm512_cmpeq_epi32_mask(key, guess_);
    const __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(key, lo_), span_) & ~same;
    same_ += __builtin_popcount(same);
    below_ = _mm512_mask_add_epi32(below_, _mm512_cmplt_epi32_mask(key, lo_), below_, _mm512_set1_epi32(1));
    if (inside) list(i, inside, key);  // rare: windows are narrow
  }

  // Adds up what one block has given. A lane of below_ counts at most kScaleBlock.
  WSN_INLINE void finish(int64_t *counts) {
    if (!speculation_) return;
    counts[0] += _mm512_reduce_add_epi32(below_), counts[1] += same_;
    below_ = _mm512_setzero_si512(), same_ = 0;
    if (listed_ > 0) speculation_->report(speculation_->context, list_, listed_);
    listed_ = 0;
  }

 private:
  __attribute__((noinline)) void list(int64_t i, unsigned inside, __m512i key) {
    alignas(64) int32_t keys[16];
    _mm512_store_si512(keys, key);
    for (; inside; inside &= inside - 1) {
      const int lane = __builtin_ctz(inside);
      list_[listed_++] = {i + lane, int64_t(keys[lane])};
    }
  }

  const wsn::Speculation *const speculation_;
  float *const out_;
  const bool streams_;  // past the caches: masked weights that leave them before the next forward pass
  __m512i guess_ = _mm512_setzero_si512(), lo_ = guess_, span_ = guess_, below_ = guess_;
  int64_t same_ = 0, listed_ = 0;
  wsn::Listed list_[kScaleBlock];
};

template <int kTransform, bool kCoded>
void adamw_blocks(const wsn::Gradients &g, const wsn::Update<wsn::AdamWStep> &for_weight,
                  const wsn::Update<wsn::AdamWStep> &for_scores, const wsn::Speculation *speculation, int64_t begin,
                  int64_t end, int64_t *counts) {
  const wsn::Backward &a = g.a;
  float *const weight = static_cast<float *>(const_cast<void *>(a.weight));
  float *const scores = static_cast<float *>(const_cast<void *>(a.scores.data));
  const float *const grad = static_cast<const float *>(a.grad);
  const AdamWVectors weight_step(for_weight.step), scores_step(for_scores.step);
  const __m512i tau = _mm512_set1_epi32(int32_t(a.tau)), infinity = _mm512_set1_epi32(int32_t(a.scores.infinity));
  const __m512 scale = _mm512_set1_ps(float(g.scale)), zero = _mm512_setzero_ps();
  BlockMeans<kCoded> weight_means(for_weight), scores_means(for_scores);
  NextBlock<kTransform> next(speculation);
  for (int64_t i = begin; i < end; i += kScaleBlock) {
    weight_means.load(i), scores_means.load(i);
    for (int64_t j = 0; j < kScaleBlock; j += 16) {
      const int64_t at = i + j;
      prefetch_line(weight + at + kAheadOf), prefetch_line(scores + at + kAheadOf), prefetch_line(grad + at + kAheadOf);
      const __m512 w = _mm512_loadu_ps(weight + at), s = _mm512_loadu_ps(scores + at), dy = _mm512_loadu_ps(grad + at);
      const __mmask16 frozen = a.union_mask ? ::at<uint16_t>(a.union_mask, at / 16) : uint16_t(0);
      const __mmask16 kept = _mm512_cmpge_epi32_mask(keys_of<kTransform>(s, infinity), tau) & ~frozen;
      const __m512 dw = _mm512_mul_ps(_mm512_maskz_mov_ps(kept, dy), scale);
      __m512 ds = _mm512_mul_ps(dy, w);
      if (kTransform == WSN_MAGNITUDE) {
        const __m512 above = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(s, zero, _CMP_GT_OQ), _mm512_set1_ps(1));
        ds = _mm512_mul_ps(
            ds, _mm512_mask_mov_ps(above, _mm512_cmp_ps_mask(s, zero, _CMP_LT_OQ), _mm512_set1_ps(-1)));
      }
      __m512 m, v;
      scores_means.get(j, &m, &v);
      const __m512 new_s = scores_step.after<!kCoded>(s, _mm512_mul_ps(ds, scale), &m, &v);
      scores_means.put(j, m, v);
      weight_means.get(j, &m, &v);
      const __m512 new_w = _mm512_mask_mov_ps(weight_step.after<!kCoded>(w, dw, &m, &v), frozen, w);
      weight_means.put(j, m, v);
      _mm512_storeu_ps(scores + at, new_s), _mm512_storeu_ps(weight + at, new_w);
      next.gate(at, new_w, new_s, infinity);
    }
    weight_means.store(), scores_means.store();
    next.finish(counts);
  }
  if (speculation && speculation->gate.streams) _mm_sfence();
}

// Does as many whole blocks of scales as there are from `begin` on, and returns where the rest begins.
inline int64_t adamw_whole_blocks(const wsn::Gradients &g, const wsn::Update<wsn::AdamWStep> &weight,
                                  const wsn::Update<wsn::AdamWStep> &scores, const wsn::Speculation *speculation,
                                  int64_t begin, int64_t end, int64_t *counts) {
  const wsn::Backward &a = g.a;
  const int storage = weight.first.storage;
  if (g.score_grad || weight.step.decay != 0 || scores.step.decay != 0 || a.grad_dtype != WSN_FLOAT32 ||
      storage != scores.first.storage || storage == WSN_MEANS_BFLOAT16 ||
      (speculation && speculation->gate.out_dtype != WSN_FLOAT32))
    return begin;
  end -= (end - begin) % kScaleBlock;
  const bool coded = storage == WSN_MEANS_8BIT;
  const auto run = a.rule == WSN_MAGNITUDE ? coded ? adamw_blocks<WSN_MAGNITUDE, true> : adamw_blocks<WSN_MAGNITUDE, false>
                   : coded                 ? adamw_blocks<WSN_VALUE, true>
                                           : adamw_blocks<WSN_VALUE, false>;
  run(g, weight, scores, speculation, begin, end, counts);
  return end;
}

}  // namespace

#endif
