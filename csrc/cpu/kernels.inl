// The inner loops. Compiled once per instruction set, by a file that defines WSN_KERNELS, the name of the table.
//
// Everything is in an unnamed namespace and uses no inline function of the standard library: the linker keeps one copy
// of such a function, and could keep the one with instructions that the machine lacks. Loops are written for the
// compiler to vectorise: one block at a time, without branches, through buffers that stay in the first-level cache.
#include <type_traits>

#include "adamw_avx512.hpp"
#include "bits.hpp"
#include "intrinsics.hpp"
#include "kernels.hpp"
#include "means.hpp"
#include "numbers.hpp"
#include "parallel.hpp"

#if defined(_MSC_VER)
#define WSN_RESTRICT __restrict
#else
#define WSN_RESTRICT __restrict__
#endif

// Before a loop of many streams: none overlaps another, which the compiler would check by too many comparisons.
#if defined(__clang__)
#define WSN_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define WSN_NO_OVERLAP _Pragma("GCC ivdep")
#else
#define WSN_NO_OVERLAP
#endif

namespace {

using wsn::AdamWStep;
using wsn::kBlock;
using wsn::SgdStep;
using wsn::Source;

// Elements that a step of an optimizer has in hand at once: their means, decoded, stay in the first-level cache.
constexpr int64_t kStepBlock = 512;

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
WSN_INLINE typename K::I key_of(typename K::I bits, typename K::I infinity) {
  using I = typename K::I;
  if (K::transform == wsn::kKeys) return bits;
  const I magnitude = I(bits & I(typename K::U(-1) >> 1));
  if (K::transform == WSN_MAGNITUDE) return magnitude;
  return ((bits < 0) & (magnitude <= infinity)) ? I(-magnitude) : magnitude;
}

template <class K>
WSN_INLINE typename K::I key_at(const void *data, int64_t i, typename K::I infinity) {
  return key_of<K>(at<typename K::I>(data, i), infinity);
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

void convert(int from_dtype, const void *from, int to_dtype, int64_t n, void *to) {
  with_dtype(from_dtype, [&](auto f) {
    with_dtype(to_dtype, [&](auto t) { convert_block<decltype(f), decltype(t)>(from, n, to); });
  });
}

// The block itself where it has the dtype, else converted into the buffer.
const void *block_as(const void *from, int from_dtype, int to_dtype, int64_t n, void *buffer) {
  if (from_dtype == to_dtype) return from;
  convert(from_dtype, from, to_dtype, n, buffer);
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

// A block of an output that may pass by the caches: what is written to data() reaches its place with send().
class Outgoing {
 public:
  Outgoing(char *to, bool streams)
      : to_(to), streams_(streams && kCanStream && reinterpret_cast<uintptr_t>(to) % 32 == 0) {}
  char *data() { return streams_ ? local_ : to_; }
  void send(int64_t bytes) const {
    if (!streams_) return;
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 32 <= bytes; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i *>(to_ + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i *>(local_ + i)));
#endif
    for (; i < bytes; ++i) to_[i] = local_[i];
  }
  // After the last block: what other threads read of them next is there.
  static void finish() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
  }

 private:
#if defined(__AVX2__)
  static constexpr bool kCanStream = true;
#else
  static constexpr bool kCanStream = false;
#endif
  char *const to_;
  const bool streams_;
  alignas(64) char local_[8 * kBlock];
};

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
    Outgoing out(element(a.out, a.out_dtype, i), a.streams);
    select_block(a.out_dtype, weight, flags, n, out.data());
    out.send(n * size_of(a.out_dtype));
  }
  if (a.streams) Outgoing::finish();
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
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = block_length(i, end);
    Outgoing dweight(a.dweight ? element(a.dweight, a.weight_dtype, i) : nullptr, a.streams && a.dweight);
    Outgoing dscores(a.dscores ? element(a.dscores, a.scores_dtype, i) : nullptr, a.streams && a.dscores);
    gradients(a, i, n, dweight.data(), dscores.data(), frozen);
    dweight.send(n * size_of(a.weight_dtype));
    dscores.send(n * size_of(a.scores_dtype));
  }
  if (a.streams) Outgoing::finish();
}

// --- optimizers: each line rounds as the operation of PyTorch's optimizer that it stands for -------------------------

// A running mean that is fed with zeros (dead inputs, weights that left the mask) shrinks to a denormal number and stays
// there, where processors are a hundred times slower. So these are 0: nothing that a parameter could feel. Where means
// are stored in fewer bytes (not kPlain), their code sees to this. GCC vectorises a loop with a constant bound only.
template <bool kPlain, class T>
WSN_INLINE T normal_or_zero(T x) {
  constexpr T least = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  return kPlain && (x < 0 ? -x : x) < least ? T(0) : x;
}

// A choice that is made once for a whole loop: f(std::true_type) or f(std::false_type).
template <class F>
void with_constant(bool condition, F f) {
  if (condition)
    f(std::true_type());
  else
    f(std::false_type());
}

template <class T>
using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// All bits of a word set where the packed bit is, else none.
template <class W>
void unpack_words(const uint8_t *packed, int64_t n, W *WSN_RESTRICT words) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(W) == 4)
    for (; i + 16 <= n; i += 16) {
      const auto bits = __mmask16(packed[i / 8] | packed[i / 8 + 1] << 8);
      _mm512_storeu_si512(words + i, _mm512_maskz_set1_epi32(bits, -1));
    }
#elif defined(__AVX2__)
  if constexpr (sizeof(W) == 4) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (; i + 8 <= n; i += 8) {
      const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(packed[i / 8]), bit);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(words + i), _mm256_cmpeq_epi32(bits, bit));
    }
  }
#endif
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) words[i + j] = W(0) - W(packed[i / 8] >> j & 1);
  for (; i < n; ++i) words[i] = W(0) - W(packed[i / 8] >> (i % 8) & 1);
}

// Frozen values have all bits set in `frozen`, which may be NULL, and keep theirs.
template <bool kFrozen, class T>
WSN_INLINE void put_unless_frozen(void *param, int64_t j, T before, T after, const Word<T> *frozen) {
  if (kFrozen) {
    const Word<T> kept = bits_as<Word<T>>(before) & frozen[j], changed = bits_as<Word<T>>(after) & ~frozen[j];
    put(param, j, Word<T>(kept | changed));
  } else {
    put(param, j, after);
  }
}

// The coefficients in the dtype of the parameter, and what becomes of one element.
template <class T, bool kPlain>
struct AdamW {
  T lerp, beta2, rest2, eps, size, shrink, decay;
  Divisor<T> correction;
  bool near;

  explicit AdamW(const AdamWStep &step)
      : lerp(T(step.lerp < 0.5 ? step.lerp : step.lerp - 1)), beta2(T(step.beta2)), rest2(T(step.one_minus_beta2)),
        eps(T(step.eps)), size(T(-step.step_size)), shrink(T(step.shrink)), decay(T(step.decay)),
        correction(T(step.root_correction)), near(step.lerp < 0.5) {}

  template <bool kCoupled>
  WSN_INLINE T after(T before, T grad, void *avg, void *avg_sq, int64_t j) const {
    const T m = at<T>(avg, j), g = kCoupled ? multiply_add(before, decay, grad) : grad;
    const T m_new = normal_or_zero<kPlain>(multiply_add(lerp, g - m, near ? m : g));
    const T v_new = normal_or_zero<kPlain>(at<T>(avg_sq, j) * beta2 + rest2 * g * g);
    put(avg, j, m_new);
    put(avg_sq, j, v_new);
    return before * shrink + size * m_new / (correction.divide(root(v_new)) + eps);
  }
};

template <bool kFrozen, bool kCoupled, bool kPlain, class T>
void adamw_block(void *WSN_RESTRICT param, const T *WSN_RESTRICT grad, void *WSN_RESTRICT avg,
                 void *WSN_RESTRICT avg_sq, const Word<T> *WSN_RESTRICT frozen, int64_t n,
                 const AdamWStep &step) {
  const AdamW<T, kPlain> adamw(step);
  WSN_NO_OVERLAP
  for (int64_t j = 0; j < n; ++j) {
    const T before = at<T>(param, j);
    put_unless_frozen<kFrozen>(param, j, before,
                               adamw.template after<kCoupled>(before, at<T>(grad, j), avg, avg_sq, j), frozen);
  }
}

// A weight, its scores, and both gradients formed from the masked weight's, in one loop: the memory is read in as many
// streams at once as the hardware can follow.
template <bool kFrozen, bool kPlainWeight, bool kPlainScores, class K, class T>
void adamw_pair_block(void *WSN_RESTRICT weight, void *WSN_RESTRICT scores, const void *WSN_RESTRICT grad,
                      void *WSN_RESTRICT weight_avg, void *WSN_RESTRICT weight_avg_sq, void *WSN_RESTRICT scores_avg,
                      void *WSN_RESTRICT scores_avg_sq, const Word<T> *WSN_RESTRICT frozen, typename K::I tau,
                      typename K::I infinity, T scale, int64_t n, const AdamWStep &for_weight,
                      const AdamWStep &for_scores) {
  using W = Word<T>;
  const AdamW<T, kPlainWeight> weight_step(for_weight);
  const AdamW<T, kPlainScores> scores_step(for_scores);
  WSN_NO_OVERLAP
  for (int64_t j = 0; j < n; ++j) {
    const T w = at<T>(weight, j), s = at<T>(scores, j), g = at<T>(grad, j);
    const T masked = key_of<K>(bits_as<typename K::I>(s), infinity) >= tau ? g : T(0);
    const T dw = (kFrozen ? bits_as<T>(W(bits_as<W>(masked) & ~frozen[j])) : masked) * scale;
    T ds = g * w;
    if (K::transform == WSN_MAGNITUDE) ds *= static_cast<T>((s > 0) - (s < 0));
    put(scores, j, scores_step.template after<false>(s, ds * scale, scores_avg, scores_avg_sq, j));
    put_unless_frozen<kFrozen>(weight, j, w,
                               weight_step.template after<false>(w, dw, weight_avg, weight_avg_sq, j), frozen);
  }
}

template <bool kFrozen, bool kMomentum, bool kPlain, class T>
void sgd_block(void *WSN_RESTRICT param, const T *WSN_RESTRICT grad, void *WSN_RESTRICT buffer,
               const Word<T> *WSN_RESTRICT frozen, int64_t n, const SgdStep &step) {
  const T lr = T(-step.lr), momentum = T(step.momentum), rest = T(step.one_minus_dampening), decay = T(step.decay);
  const bool coupled = step.decay != 0, nesterov = step.nesterov, first = step.first;
  for (int64_t j = 0; j < n; ++j) {
    const T before = at<T>(param, j);
    T g = coupled ? multiply_add(before, decay, at<T>(grad, j)) : at<T>(grad, j);
    if (kMomentum) {
      const T b = first ? g : normal_or_zero<kPlain>(multiply_add(g, rest, at<T>(buffer, j) * momentum));
      put(buffer, j, b);
      g = nesterov ? multiply_add(b, momentum, g) : b;
    }
    put_unless_frozen<kFrozen>(param, j, before, multiply_add(g, lr, before), frozen);
  }
}

template <class T>
T *element_of(const wsn::Means &means, int64_t i) {
  return static_cast<T *>(means.values) + i;
}

template <class T>
void update_block(void *param, const T *grad, const wsn::Update<AdamWStep> &update, const Word<T> *frozen, int64_t i,
                  int64_t n) {
  void *const avg = element_of<T>(update.first, i - update.origin);
  void *const avg_sq = element_of<T>(update.second, i - update.origin);
  with_constant(frozen != nullptr, [&](auto has_frozen) {
    with_constant(update.step.decay != 0, [&](auto coupled) {
      with_constant(update.is_plain(), [&](auto plain) {
        adamw_block<decltype(has_frozen)::value, decltype(coupled)::value, decltype(plain)::value>(
            param, grad, avg, avg_sq, frozen, n, update.step);
      });
    });
  });
}

template <class T>
void update_block(void *param, const T *grad, const wsn::Update<SgdStep> &update, const Word<T> *frozen, int64_t i,
                  int64_t n) {
  void *const buffer = update.first.values ? element_of<T>(update.first, i - update.origin) : nullptr;
  with_constant(frozen != nullptr, [&](auto has_frozen) {
    with_constant(buffer != nullptr, [&](auto momentum) {
      with_constant(update.is_plain(), [&](auto plain) {
        sgd_block<decltype(has_frozen)::value, decltype(momentum)::value, decltype(plain)::value>(
            param, grad, buffer, frozen, n, update.step);
      });
    });
  });
}

// The block as it is, or times the factor, in the buffer.
template <class T>
const T *scaled_block(const T *from, double factor, int64_t n, T *buffer) {
  if (factor == 1) return from;
  const T scale = T(factor);
  for (int64_t j = 0; j < n; ++j) put(buffer, j, at<T>(from, j) * scale);
  return buffer;
}

// dW and dS of one block: in the buffers, or where they were given.
template <class T>
struct GradientBlock {
  alignas(64) T weight_buffer[kBlock], scores_buffer[kBlock];
  alignas(64) uint8_t flags[kBlock];
  const T *weight, *scores;

  void form(const wsn::Gradients &g, int64_t i, int64_t n) {
    if (g.score_grad) {
      weight = static_cast<const T *>(g.a.grad) + i;
      scores = static_cast<const T *>(g.score_grad) + i;
    } else {
      gradients(g.a, i, n, weight_buffer, scores_buffer, flags);
      weight = weight_buffer, scores = scores_buffer;
    }
    weight = scaled_block(weight, g.scale, n, weight_buffer);
    scores = scaled_block(scores, g.scale, n, scores_buffer);
  }
};

// The gate of one block by a guess of the threshold, and what may turn out otherwise.
template <class K>
void speculate_block(const wsn::Speculation &s, int64_t begin, int64_t n, int64_t *counts) {
  using I = typename K::I;
  using U = typename K::U;
  alignas(64) U keep[kBlock];
  alignas(64) uint8_t uncertain[kBlock];
  alignas(64) char buffer[8 * kBlock];
  const wsn::Gate &g = s.gate;
  const void *const data = element(g.scores.data, g.weight_dtype, begin);
  const I infinity = I(g.scores.infinity), guess = I(g.tau), lo = I(s.lo);
  const U span = U(U(s.hi) - U(s.lo));
  U below = 0, same = 0;  // as wide as the keys, for full vectors; a block fits
  for (int64_t j = 0; j < n; ++j) {
    const I key = key_at<K>(data, j, infinity);
    keep[j] = U(-U(key >= guess));
    uncertain[j] = (U(U(key) - U(lo)) <= span) & (key != guess);
    below = U(below + (key < lo));
    same = U(same + (key == guess));
  }
  counts[0] += int64_t(below), counts[1] += int64_t(same);
  const void *const weight = element(g.weight, g.weight_dtype, begin);
  void *const out = element(g.out, g.out_dtype, begin);
  const bool converts = g.out_dtype != g.weight_dtype;
  void *const masked = converts ? buffer : out;  // +0.0 is all zeros in every dtype
  for (int64_t j = 0; j < n; ++j) put(masked, j, U(at<U>(weight, j) & keep[j]));
  if (converts) convert(g.weight_dtype, masked, g.out_dtype, n, out);

  wsn::Listed list[kBlock];
  int64_t count = 0;
  for (int64_t j = n; j % 8; ++j) uncertain[j] = 0;
  for (int64_t j = 0; j < n; j += 8) {
    if (load64(uncertain + j) == 0) continue;  // most groups: windows are narrow
    for (int64_t t = j; t < j + 8; ++t) {
      if (!uncertain[t]) continue;
      list[count++] = {begin + t, int64_t(key_at<K>(data, t, infinity))};
    }
  }
  if (count > 0) s.report(s.context, list, count);
}

void speculate_block(const wsn::Speculation &s, int64_t begin, int64_t n, int64_t *counts) {
  with_kind(s.gate.scores, [&](auto kind) { speculate_block<decltype(kind)>(s, begin, n, counts); });
}

// One loop for both updates of a block, where there is one. False: there is none.
template <class T>
bool update_pair(const wsn::Gradients &g, const wsn::Update<AdamWStep> &weight, const wsn::Update<AdamWStep> &scores,
                 const Word<T> *frozen, int64_t i, int64_t n) {
  const wsn::Backward &a = g.a;
  if (g.score_grad || weight.step.decay != 0 || scores.step.decay != 0) return false;
  alignas(64) char buffer[8 * kBlock];
  const void *const grad = block_as(element(a.grad, a.grad_dtype, i), a.grad_dtype, a.weight_dtype, n, buffer);
  const auto block = [&](const void *data) { return static_cast<T *>(const_cast<void *>(data)) + i; };
  with_constant(frozen != nullptr, [&](auto has_frozen) {
    with_constant(a.rule == WSN_MAGNITUDE, [&](auto magnitude) {
      using K = Kind<std::make_signed_t<Word<T>>, decltype(magnitude)::value ? WSN_MAGNITUDE : WSN_VALUE>;
      with_constant(weight.is_plain(), [&](auto plain_weight) {
        with_constant(scores.is_plain(), [&](auto plain_scores) {
          adamw_pair_block<decltype(has_frozen)::value, decltype(plain_weight)::value, decltype(plain_scores)::value, K,
                           T>(block(a.weight), block(a.scores.data), grad,
                              element_of<T>(weight.first, i - weight.origin),
                              element_of<T>(weight.second, i - weight.origin),
                              element_of<T>(scores.first, i - scores.origin),
                              element_of<T>(scores.second, i - scores.origin), frozen, typename K::I(a.tau),
                              typename K::I(a.scores.infinity), T(g.scale), n, weight.step, scores.step);
        });
      });
    });
  });
  return true;
}

template <class T>
bool update_pair(const wsn::Gradients &, const wsn::Update<SgdStep> &, const wsn::Update<SgdStep> &, const Word<T> *,
                 int64_t, int64_t) {
  return false;
}

// The operands of a step after element i, up to element `end` of them: on their way into the second-level cache.
// Hardware follows a stream up to the end of a page (1024 floats), and each step reads eight or more of them.
constexpr int64_t kAhead = 1024;

inline void prefetch(const void *data, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(data) + i, 0, 2);
#else
  (void)data, (void)bytes;
#endif
}

template <class T>
void prefetch_means(const wsn::Means &means, int64_t i, int64_t n) {
  if (means.values == nullptr) return;
  const int64_t size = means.storage == WSN_MEANS_8BIT ? 1 : means.storage == WSN_MEANS_BFLOAT16 ? 2 : int64_t(sizeof(T));
  prefetch(static_cast<const char *>(means.values) + i * size, n * size);
}

template <class T, class Step>
void prefetch_step(const wsn::Gradients &g, const wsn::Update<Step> &weight, const wsn::Update<Step> &scores,
                   const wsn::Speculation *speculation, int64_t i, int64_t end) {
  const int64_t n = end - i < kStepBlock ? end - i : kStepBlock;
  const wsn::Backward &a = g.a;
  if (n <= 0) return;
  prefetch(element(a.weight, a.weight_dtype, i), n * size_of(a.weight_dtype));
  prefetch(element(a.scores.data, a.scores_dtype, i), n * size_of(a.scores_dtype));
  prefetch(element(a.grad, a.grad_dtype, i), n * size_of(a.grad_dtype));
  if (g.score_grad) prefetch(element(g.score_grad, a.scores_dtype, i), n * size_of(a.scores_dtype));
  prefetch_means<T>(weight.first, i, n), prefetch_means<T>(weight.second, i, n);
  prefetch_means<T>(scores.first, i, n), prefetch_means<T>(scores.second, i, n);
  if (speculation)
    prefetch(element(speculation->gate.out, speculation->gate.out_dtype, i), n * size_of(speculation->gate.out_dtype));
}

template <class T, class Step>
void step_typed(const wsn::Gradients &g, const wsn::Update<Step> &weight, const wsn::Update<Step> &scores,
                const wsn::Speculation *speculation, int64_t begin, int64_t end, int64_t *counts) {
  const wsn::Backward &a = g.a;
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Step, AdamWStep>)
    begin = adamw_whole_blocks(g, weight, scores, speculation, begin, end, counts);
#endif
  GradientBlock<T> grads;
  alignas(64) Word<T> words[kStepBlock];
  const Word<T> *const frozen = a.union_mask ? words : nullptr;
  MeansBlock<Step> weight_means(weight), scores_means(scores);
  for (int64_t i = begin; i < end; i += kStepBlock) {
    const int64_t n = end - i < kStepBlock ? end - i : kStepBlock;
    prefetch_step<T>(g, weight, scores, speculation, i + kAhead, end);
    if (frozen) unpack_words(a.union_mask + i / 8, n, words);
    const wsn::Update<Step> &for_weight = weight_means.load(i, n), &for_scores = scores_means.load(i, n);
    if (!update_pair<T>(g, for_weight, for_scores, frozen, i, n)) {
      grads.form(g, i, n);
      update_block<T>(const_cast<char *>(element(a.weight, a.weight_dtype, i)), grads.weight, for_weight, frozen, i, n);
      update_block<T>(const_cast<char *>(element(a.scores.data, a.scores_dtype, i)), grads.scores, for_scores, nullptr,
                      i, n);
    }
    weight_means.store(i, n), scores_means.store(i, n);
    if (speculation) speculate_block(*speculation, i, n, counts);
  }
}

template <class Step>
void step(const wsn::Gradients &g, const wsn::Update<Step> &weight, const wsn::Update<Step> &scores,
          const wsn::Speculation *speculation, int64_t begin, int64_t end, int64_t *counts) {
  if (g.a.weight_dtype == WSN_FLOAT64)
    step_typed<double>(g, weight, scores, speculation, begin, end, counts);
  else
    step_typed<float>(g, weight, scores, speculation, begin, end, counts);
}

template <class T>
double sum_of_squares(const T *values, int64_t n) {
  constexpr int64_t kLanes = 16;  // sums side by side, for the compiler to vectorise
  double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const double x = double(at<T>(values, j + l));
      lanes[l] += x * x;
    }
  double sum = 0;
  for (; j < n; ++j) sum += double(at<T>(values, j)) * double(at<T>(values, j));
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <class T>
void squares_typed(const wsn::Gradients &g, int64_t begin, int64_t end, double *sums) {
  GradientBlock<T> grads;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = block_length(i, end);
    grads.form(g, i, n);
    sums[0] += sum_of_squares(grads.weight, n), sums[1] += sum_of_squares(grads.scores, n);
  }
}

void squares(const wsn::Gradients &g, int64_t begin, int64_t end, double *sums) {
  if (g.a.weight_dtype == WSN_FLOAT64)
    squares_typed<double>(g, begin, end, sums);
  else
    squares_typed<float>(g, begin, end, sums);
}

void amend(const wsn::Gate &g, const wsn::Listed *list, int64_t count, int64_t lo, int64_t hi) {
  char buffer[8];
  for (int64_t i = 0; i < count; ++i) {
    const wsn::Listed &one = list[i];
    if (one.key < lo || one.key >= hi) continue;
    const void *const weight =
        block_as(element(g.weight, g.weight_dtype, one.element), g.weight_dtype, g.out_dtype, 1, buffer);
    const uint8_t keep = one.key >= g.tau;
    select_block(g.out_dtype, weight, &keep, 1, element(g.out, g.out_dtype, one.element));
  }
}

// --- packed masks ----------------------------------------------------------------------------------------------------

// The OR of kRows rows, and of what is there already unless they are the first.
template <int kRows, bool kFirst>
void unite_rows(const uint8_t *from, int64_t nbytes, int64_t n, uint8_t *WSN_RESTRICT to) {
  WSN_NO_OVERLAP
  for (int64_t j = 0; j < n; ++j) {
    uint8_t bits = kFirst ? uint8_t(0) : to[j];
    for (int row = 0; row < kRows; ++row) bits = uint8_t(bits | from[row * nbytes + j]);
    to[j] = bits;
  }
}

// A part of the result stays in the second-level cache while all rows pass, some at a time and in long stretches.
void unite(const uint8_t *packed, int64_t rows, int64_t nbytes, int64_t begin, int64_t end, uint8_t *out) {
  constexpr int64_t kPart = 64 * kBlock;
  constexpr int kAtOnce = 4;
  for (int64_t i = begin; i < end; i += kPart) {
    const int64_t n = end - i < kPart ? end - i : kPart;
    const uint8_t *from = packed + i;
    int64_t left = rows;
    if (left >= kAtOnce) {
      unite_rows<kAtOnce, true>(from, nbytes, n, out + i);
      from += kAtOnce * nbytes, left -= kAtOnce;
    } else {
      unite_rows<1, true>(from, nbytes, n, out + i);
      from += nbytes, --left;
    }
    for (; left >= kAtOnce; left -= kAtOnce, from += kAtOnce * nbytes)
      unite_rows<kAtOnce, false>(from, nbytes, n, out + i);
    for (; left > 0; --left, from += nbytes) unite_rows<1, false>(from, nbytes, n, out + i);
  }
}

}  // namespace

const wsn::Kernels wsn::WSN_KERNELS = {count_upto,       collect,       sample,  gate,  backward,
                                       step<AdamWStep>, step<SgdStep>, squares, amend, unite};
