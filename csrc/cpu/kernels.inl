// The inner loops. Compiled once per instruction set, by a file that defines WSN_KERNELS, the name of the table.
//
// Everything is in an unnamed namespace and uses no inline function of the standard library: the linker keeps one copy
// of such a function, and could keep the one with instructions that the machine lacks. Loops are written for the
// compiler to vectorise: one block at a time, without branches, through buffers that stay in the first-level cache.
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "bits.hpp"
#include "kernels.hpp"
#include "numbers.hpp"
#include "parallel.hpp"

#if defined(_MSC_VER)
#define WSN_RESTRICT __restrict
#else
#define WSN_RESTRICT __restrict__
#endif

namespace {

using wsn::AdamWStep;
using wsn::kBlock;
using wsn::SgdStep;
using wsn::Source;

inline int64_t block_length(int64_t begin, int64_t end) { return end - begin < kBlock ? end - begin : kBlock; }

template <class Key, int kTransform>
struct Kind {
  using I = Key;
  using U = std::make_unsigned_t<Key>;
  static constexpr int transform = kTransform;
};

template <class I, class F>
auto with_transform(int transform, F f) {
  if (transform == WSN_MAGNITUDE) return f(Kind<I, WSN_MAGNITUDE>());
  if (transform == WSN_VALUE) return f(Kind<I, WSN_VALUE>());
  return f(Kind<I, wsn::kKeys>());
}

// f(Kind) for the kind of the source.
template <class F>
auto with_kind(const Source &source, F f) {
  if (source.width == 4) return with_transform<int32_t>(source.transform, f);
  if (source.width == 8) return with_transform<int64_t>(source.transform, f);
  return with_transform<int16_t>(source.transform, f);
}

template <class K>
inline typename K::I key_at(const void *data, int64_t i, typename K::I infinity) {
  using I = typename K::I;
  const I bits = at<I>(data, i);
  if (K::transform == wsn::kKeys) return bits;
  const I magnitude = I(bits & I(typename K::U(-1) >> 1));
  if (K::transform == WSN_MAGNITUDE) return magnitude;
  return (bits < 0) & (magnitude <= infinity) ? I(-magnitude) : magnitude;
}

// --- selection -------------------------------------------------------------------------------------------------------

int64_t count_upto(const Source &source, int64_t begin, int64_t end, int64_t bound) {
  return with_kind(source, [&](auto kind) {
    using K = decltype(kind);
    const auto limit = typename K::I(bound);
    const auto infinity = typename K::I(source.infinity);
    const void *const data = source.data;
    int64_t total = 0;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t stop = i + block_length(i, end);
      typename K::U count = 0;  // as wide as the keys, for full vectors; a block fits
      for (int64_t j = i; j < stop; ++j) count = typename K::U(count + (key_at<K>(data, j, infinity) <= limit));
      total += int64_t(count);
    }
    return total;
  });
}

// Writes the keys that lie `first <= key < first + span`, as unsigned numbers, one after the other, and returns their
// number. May write up to kListSlack keys more.
template <class I>
int64_t compact_block(const I *keys, int64_t n, std::make_unsigned_t<I> first, std::make_unsigned_t<I> span, I *list) {
  using U = std::make_unsigned_t<I>;
  int64_t listed = 0;
#if defined(__AVX512F__)  // the one loop that compilers do not vectorise by themselves
  if constexpr (sizeof(I) >= 4) {
    static_assert(wsn::kListSlack >= 64 / sizeof(I), "a whole vector is written");
    for (int64_t j = 0; j < n; j += int64_t(64 / sizeof(I))) {
      const __m512i key = _mm512_loadu_si512(keys + j);
      __m512i found;
      int count;
      if constexpr (sizeof(I) == 4) {
        const __m512i offset = _mm512_sub_epi32(key, _mm512_set1_epi32(int(first)));
        const __mmask16 inside = _mm512_cmplt_epu32_mask(offset, _mm512_set1_epi32(int(span)));
        found = _mm512_maskz_compress_epi32(inside, key);
        count = __builtin_popcount(inside);
      } else {
        const __m512i offset = _mm512_sub_epi64(key, _mm512_set1_epi64(int64_t(first)));
        const __mmask8 inside = _mm512_cmplt_epu64_mask(offset, _mm512_set1_epi64(int64_t(span)));
        found = _mm512_maskz_compress_epi64(inside, key);
        count = __builtin_popcount(inside);
      }
      _mm512_storeu_si512(list + listed, found);
      listed += count;
    }
    return listed;
  }
#endif
  alignas(64) uint8_t inside[kBlock];
  for (int64_t j = 0; j < n; ++j) inside[j] = U(U(keys[j]) - first) < span;
  for (int64_t j = n; j % 8; ++j) inside[j] = 0;
  for (int64_t j = 0; j < n; j += 8) {
    if (load64(inside + j) == 0) continue;  // most groups: windows are narrow
    for (int64_t t = j; t < j + 8; ++t) {
      list[listed] = keys[t];
      listed += inside[t];
    }
  }
  return listed;
}

template <class K>
int64_t collect_block(const Source &source, int64_t begin, int64_t n, typename K::I lo, typename K::I hi,
                      typename K::I *list, int64_t *counts) {
  using I = typename K::I;
  using U = typename K::U;
  alignas(64) I keys[kBlock];
  const auto infinity = I(source.infinity);
  const void *const data = source.data;
  U below = 0, upto_lo = 0, upto_hi = 0;  // as wide as the keys, for full vectors; a block fits
  for (int64_t j = 0; j < n; ++j) {
    const I key = key_at<K>(data, begin + j, infinity);
    keys[j] = key;
    below = U(below + (key < lo));
    upto_lo = U(upto_lo + (key <= lo));
    upto_hi = U(upto_hi + (key <= hi));
  }
  counts[0] += int64_t(below), counts[1] += int64_t(upto_lo), counts[2] += int64_t(upto_hi);
  if (hi <= lo) return 0;
  for (int64_t j = n; j % 16; ++j) keys[j] = lo;  // whole vectors of keys, none of these inside
  return compact_block<I>(keys, n, U(U(lo) + 1), U(U(hi) - U(lo) - 1), list);
}

int64_t collect(const Source &source, int64_t begin, int64_t end, int64_t lo, int64_t hi, void *list,
                int64_t *counts) {
  return with_kind(source, [&](auto kind) {
    using K = decltype(kind);
    using I = typename K::I;
    int64_t listed = 0;
    for (int64_t i = begin; i < end; i += kBlock)
      listed +=
          collect_block<K>(source, i, block_length(i, end), I(lo), I(hi), static_cast<I *>(list) + listed, counts);
    return listed;
  });
}

void sample(const Source &source, int64_t n, int64_t m, void *keys) {
  with_kind(source, [&](auto kind) {
    using K = decltype(kind);
    const auto infinity = typename K::I(source.infinity);
    for (int64_t i = 0; i < m; ++i) put(keys, i, key_at<K>(source.data, wsn::sample_position(i, n, m), infinity));
  });
}

// --- blocks of the gate ----------------------------------------------------------------------------------------------

template <int kDtype>
struct Dtype {
  using N = Number<kDtype>;
  using Bits = typename N::Bits;
  using Real = typename N::Real;
};

template <class F>
void with_dtype(int dtype, F f) {
  if (dtype == WSN_FLOAT32) return f(Dtype<WSN_FLOAT32>());
  if (dtype == WSN_FLOAT64) return f(Dtype<WSN_FLOAT64>());
  if (dtype == WSN_BFLOAT16) return f(Dtype<WSN_BFLOAT16>());
  return f(Dtype<WSN_FLOAT16>());
}

inline int64_t size_of(int dtype) { return dtype == WSN_FLOAT32 ? 4 : dtype == WSN_FLOAT64 ? 8 : 2; }
inline const char *element(const void *data, int dtype, int64_t i) {
  return static_cast<const char *>(data) + i * size_of(dtype);
}
inline char *element(void *data, int dtype, int64_t i) { return static_cast<char *>(data) + i * size_of(dtype); }

template <class K>
void keep_block(const void *data, typename K::I infinity, typename K::I tau, int64_t begin, int64_t n,
                uint8_t *WSN_RESTRICT flags) {
  for (int64_t j = 0; j < n; ++j) flags[j] = key_at<K>(data, begin + j, infinity) >= tau;
}

void keep_block(const Source &source, int64_t tau, int64_t begin, int64_t n, uint8_t *flags) {
  with_kind(source, [&](auto kind) {
    using K = decltype(kind);
    using I = typename K::I;
    keep_block<K>(source.data, I(source.infinity), I(tau), begin, n, flags);
  });
}

template <class U>
void select_block(const void *from, const uint8_t *flags, int64_t n, void *WSN_RESTRICT to) {
  for (int64_t j = 0; j < n; ++j) put(to, j, U(at<U>(from, j) & U(-U(flags[j]))));
}

void select_block(int dtype, const void *from, const uint8_t *flags, int64_t n, void *to) {
  with_dtype(dtype, [&](auto d) { select_block<typename decltype(d)::Bits>(from, flags, n, to); });
}

template <class From, class To>
void convert_block(const void *from, int64_t n, void *WSN_RESTRICT to) {
  using Real = typename To::Real;
  for (int64_t j = 0; j < n; ++j)
    put(to, j, To::N::encode(static_cast<Real>(From::N::decode(at<typename From::Bits>(from, j)))));
}

// The block itself where it has the dtype, else converted into the buffer.
const void *block_as(const void *from, int from_dtype, int to_dtype, int64_t n, void *buffer) {
  if (from_dtype == to_dtype) return from;
  with_dtype(from_dtype, [&](auto f) {
    with_dtype(to_dtype, [&](auto t) { convert_block<decltype(f), decltype(t)>(from, n, buffer); });
  });
  return buffer;
}

// from * weight, rounded, then times sign(scores): two products, as PyTorch computes it.
template <class W, class S, bool kSigned>
void score_gradient(const void *grad, const void *weight, const void *scores, int64_t n, void *WSN_RESTRICT out) {
  using Real = typename W::Real;
  for (int64_t j = 0; j < n; ++j) {
    const Real g = W::N::decode(at<typename W::Bits>(grad, j)), w = W::N::decode(at<typename W::Bits>(weight, j));
    Real product = W::N::decode(W::N::encode(g * w));
    if (kSigned) {
      const typename S::Real s = S::N::decode(at<typename S::Bits>(scores, j));
      product *= static_cast<Real>((s > 0) - (s < 0));
    }
    put(out, j, S::N::encode(static_cast<typename S::Real>(product)));
  }
}

void gate(const wsn::Gate &a, int64_t begin, int64_t end) {
  alignas(64) uint8_t local[kBlock];
  alignas(64) char buffer[8 * kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = block_length(i, end);
    uint8_t *const flags = a.mask ? a.mask + i : local;
    if (a.bits)
      unpack_block(a.bits + i / 8, n, flags);
    else
      keep_block(a.scores, a.tau, i, n, flags);
    if (a.packed) pack_block(flags, n, a.packed + i / 8);
    if (!a.out) continue;
    const void *const weight =
        block_as(element(a.weight, a.weight_dtype, i), a.weight_dtype, a.out_dtype, n, buffer);
    select_block(a.out_dtype, weight, flags, n, element(a.out, a.out_dtype, i));
  }
}

// dW and dS of one block, and the flags of frozen weights (only where there is a union).
void gradients(const wsn::Backward &a, int64_t i, int64_t n, void *dweight, void *dscores, uint8_t *frozen) {
  alignas(64) uint8_t flags[kBlock];
  alignas(64) char buffer[8 * kBlock];
  const void *const grad = block_as(element(a.grad, a.grad_dtype, i), a.grad_dtype, a.weight_dtype, n, buffer);
  if (dweight) {
    keep_block(a.scores, a.tau, i, n, flags);
    if (a.union_mask) {
      unpack_block(a.union_mask + i / 8, n, frozen);
      for (int64_t j = 0; j < n; ++j) flags[j] = uint8_t(flags[j] & ~frozen[j]);
    }
    select_block(a.weight_dtype, grad, flags, n, dweight);
  }
  if (!dscores) return;
  const void *const weight = element(a.weight, a.weight_dtype, i);
  const void *const scores = element(a.scores.data, a.scores_dtype, i);
  with_dtype(a.weight_dtype, [&](auto w) {
    with_dtype(a.scores_dtype, [&](auto s) {
      using W = decltype(w);
      using S = decltype(s);
      if (a.rule == WSN_MAGNITUDE)
        score_gradient<W, S, true>(grad, weight, scores, n, dscores);
      else
        score_gradient<W, S, false>(grad, weight, scores, n, dscores);
    });
  });
}

void backward(const wsn::Backward &a, int64_t begin, int64_t end) {
  alignas(64) uint8_t frozen[kBlock];
  for (int64_t i = begin; i < end; i += kBlock)
    gradients(a, i, block_length(i, end), a.dweight ? element(a.dweight, a.weight_dtype, i) : nullptr,
              a.dscores ? element(a.dscores, a.scores_dtype, i) : nullptr, frozen);
}

// --- optimizers: each line rounds as the operation of PyTorch's optimizer that it stands for -------------------------

// Where kFrozen, a value whose flag is set keeps its bits.
template <bool kFrozen, class T>
void adamw_block(void *WSN_RESTRICT param, const T *WSN_RESTRICT grad, void *WSN_RESTRICT avg,
                 void *WSN_RESTRICT avg_sq, const uint8_t *WSN_RESTRICT frozen, int64_t n, const AdamWStep &step) {
  const T lerp = T(step.lerp), beta2 = T(step.beta2), rest2 = T(step.one_minus_beta2), eps = T(step.eps);
  const T correction = T(step.root_correction), size = T(-step.step_size), shrink = T(step.shrink);
  const T decay = T(step.decay);
  const bool near = step.lerp < 0.5, coupled = step.decay != 0;
  for (int64_t j = 0; j < n; ++j) {
    const T before = at<T>(param, j), m = at<T>(avg, j);
    const T g = coupled ? multiply_add(before, decay, grad[j]) : grad[j];
    const T m_new = near ? multiply_add(lerp, g - m, m) : multiply_add(lerp - 1, g - m, g);
    const T v_new = at<T>(avg_sq, j) * beta2 + rest2 * g * g;
    const T after = before * shrink + size * m_new / (root(v_new) / correction + eps);
    put(avg, j, m_new);
    put(avg_sq, j, v_new);
    put(param, j, kFrozen && frozen[j] ? before : after);
  }
}

template <bool kFrozen, bool kMomentum, class T>
void sgd_block(void *WSN_RESTRICT param, const T *WSN_RESTRICT grad, void *WSN_RESTRICT buffer,
               const uint8_t *WSN_RESTRICT frozen, int64_t n, const SgdStep &step) {
  const T lr = T(-step.lr), momentum = T(step.momentum), rest = T(step.one_minus_dampening), decay = T(step.decay);
  const bool coupled = step.decay != 0, nesterov = step.nesterov, first = step.first;
  for (int64_t j = 0; j < n; ++j) {
    const T before = at<T>(param, j);
    T g = coupled ? multiply_add(before, decay, grad[j]) : grad[j];
    if (kMomentum) {
      const T b = first ? g : multiply_add(g, rest, at<T>(buffer, j) * momentum);
      put(buffer, j, b);
      g = nesterov ? multiply_add(b, momentum, g) : b;
    }
    const T after = multiply_add(g, lr, before);
    put(param, j, kFrozen && frozen[j] ? before : after);
  }
}

template <bool kFrozen, class T>
void update_block(void *param, const T *grad, const wsn::Update<AdamWStep> &update, const uint8_t *frozen,
                  int64_t i, int64_t n) {
  adamw_block<kFrozen>(param, grad, static_cast<T *>(update.first_state) + i,
                       static_cast<T *>(update.second_state) + i, frozen, n, update.step);
}

template <bool kFrozen, class T>
void update_block(void *param, const T *grad, const wsn::Update<SgdStep> &update, const uint8_t *frozen,
                  int64_t i, int64_t n) {
  if (update.first_state)
    sgd_block<kFrozen, true>(param, grad, static_cast<T *>(update.first_state) + i, frozen, n, update.step);
  else
    sgd_block<kFrozen, false>(param, grad, nullptr, frozen, n, update.step);
}

template <class T, class Step>
void step_typed(const wsn::Backward &a, const wsn::Update<Step> &weight, const wsn::Update<Step> &scores, int64_t begin,
                int64_t end) {
  alignas(64) T dweight[kBlock], dscores[kBlock];
  alignas(64) uint8_t frozen[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = block_length(i, end);
    gradients(a, i, n, dweight, dscores, frozen);
    void *const weight_block = const_cast<char *>(element(a.weight, a.weight_dtype, i));
    if (a.union_mask)
      update_block<true>(weight_block, dweight, weight, frozen, i, n);
    else
      update_block<false>(weight_block, dweight, weight, nullptr, i, n);
    update_block<false>(const_cast<char *>(element(a.scores.data, a.scores_dtype, i)), dscores, scores, nullptr, i, n);
  }
}

template <class Step>
void step(const wsn::Backward &a, const wsn::Update<Step> &weight, const wsn::Update<Step> &scores, int64_t begin,
          int64_t end) {
  if (a.weight_dtype == WSN_FLOAT64)
    step_typed<double>(a, weight, scores, begin, end);
  else
    step_typed<float>(a, weight, scores, begin, end);
}

}  // namespace

const wsn::Kernels wsn::WSN_KERNELS = {count_upto, collect,          sample, gate,
                                       backward,   step<AdamWStep>, step<SgdStep>};
