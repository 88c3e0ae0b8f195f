// The optimizer steps, and the gate of the next forward pass in the same pass over the data.
//
// The gate needs the threshold of the scores after the step, which is not known before all of them are. But thresholds
// move slowly: the pass writes the gate by a guess from the last one, counts the keys below a window around it and lists
// the elements inside. Then the threshold is an element of the list, found by its rank, and only listed elements
// between it and the guess have to be gated again. Where the rank lies outside the window, or the list is too short for
// it, the scores are searched and everything is gated: slower, and the same.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "checks.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "wsn_fast.h"

namespace {

using wsn::Gradients;
using wsn::parallel_for;
using wsn::Source;
using wsn::Speculation;

// The places of wsn_next::window.
enum { kSet, kHalfWidth, kDrift, kFound = WSN_WINDOW - 2, kSearched };

int check_tensor(const wsn_gated &t, int num_threads) {
  if (const int code = wsn::check(t.n, num_threads, t.grad, t.weight, t.scores)) return code;
  if (t.n > 0 && t.tau == nullptr && t.score_grad == nullptr) return WSN_ERROR_NULL;
  if (t.dtype != WSN_FLOAT32 && t.dtype != WSN_FLOAT64) return WSN_ERROR_DTYPE;
  if (!wsn::is_dtype(t.grad_dtype) || (t.score_grad && t.grad_dtype != t.dtype)) return WSN_ERROR_DTYPE;
  if (!wsn::is_rule(t.rule)) return WSN_ERROR_RULE;
  return WSN_OK;
}

int check_next(const wsn_gated &t) {
  if (t.n == 0 || t.next == nullptr) return WSN_OK;
  if (const int code = wsn::check(t.n, 1, t.next->masked, t.next->tau, t.next->window)) return code;
  if (!wsn::is_dtype(t.next->masked_dtype)) return WSN_ERROR_DTYPE;
  return t.next->rank < 0 || t.next->rank >= t.n ? WSN_ERROR_RANK : WSN_OK;
}

Gradients gradients_of(const wsn_gated &t) {
  const Source scores = wsn::source_of(t.scores, t.dtype, t.rule);
  const int64_t tau = t.n > 0 && t.score_grad == nullptr ? wsn::threshold_key(scores, t.tau) : 0;
  return {{scores, tau, t.dtype, t.rule, t.grad, t.weight, t.grad_dtype, t.dtype, t.union_mask, nullptr, nullptr},
          t.score_grad,
          t.scale};
}

// What a pass finds out about the threshold after it.
class NextGate {
 public:
  // Memory is had before anything is written; where there is too little, the list is short.
  explicit NextGate(const wsn_gated &t) : t_(t), next_(*t.next), room_(t.n / 8 + 64) {
    list_.reset(new (std::nothrow) wsn::Listed[size_t(room_)]);
    if (!list_) room_ = 0;
    gate_ = {wsn::source_of(t.scores, t.dtype, t.rule), 0,      nullptr, t.weight, t.dtype, nullptr, nullptr,
             next_.masked,                              next_.masked_dtype};
    gate_.streams = t.n * wsn::item_size(next_.masked_dtype) >= wsn::kStreamedBytes;
  }

  // Before the pass: nothing to go by, and no speculation, in the first step.
  bool begin() {
    if (next_.window[kSet] == 0) return false;
    before_ = wsn::threshold_key(gate_.scores, next_.tau);
    drift_ = distance(0, next_.window[kDrift]) * (next_.window[kDrift] < 0 ? -1 : 1);
    half_ = next_.window[kHalfWidth] < 0 ? 0 : distance(0, next_.window[kHalfWidth]);
    gate_.tau = beyond(before_, drift_);
    lo_ = beyond(gate_.tau, -half_);
    hi_ = beyond(gate_.tau, half_);
    return true;
  }

  Speculation speculation() {
    return {gate_, lo_, hi_,
            [](void *self, const wsn::Listed *list, int64_t count) { static_cast<NextGate *>(self)->take(list, count); },
            this};
  }

  void count(const int64_t counts[2]) {
    below_.fetch_add(counts[0], std::memory_order_relaxed);
    same_.fetch_add(counts[1], std::memory_order_relaxed);
  }

  // After the pass: the threshold, and the gate where it was not that of the guess.
  void finish(bool speculated, int threads) {
    const int64_t guess = gate_.tau;
    int64_t tau = 0;
    const bool found = speculated && find(&tau);
    if (!found) tau = wsn::select(gate_.scores, t_.n, next_.rank, threads);
    wsn::write_element(gate_.scores, tau, next_.tau);
    gate_.tau = wsn::threshold_key(gate_.scores, next_.tau);
    const bool keeps_all = tau > gate_.scores.infinity;
    if (!found || keeps_all || (tau > guess && same_ > 0))
      gate_all(threads);
    else
      wsn::kernels().amend(gate_, list_.get(), length_, std::min(tau, guess), std::max(tau, guess));
    ++next_.window[found ? kFound : kSearched];
    if (speculated) choose_window(guess, tau);
    next_.window[kSet] = 1;
  }

 private:
  void take(const wsn::Listed *list, int64_t count) {
    const int64_t start = length_.fetch_add(count, std::memory_order_relaxed);
    if (start + count <= room_) std::memcpy(list_.get() + start, list, size_t(count) * sizeof(wsn::Listed));
  }

  // The listed keys lie below the guess or above it; between them, those that are the guess.
  bool find(int64_t *tau) {
    const int64_t length = length_, rank = next_.rank - below_, guess = gate_.tau;
    if (rank < 0 || rank >= length + same_ || length > room_) return false;
    wsn::Listed *const begin = list_.get(), *const end = begin + length;
    wsn::Listed *const above = std::partition(begin, end, [&](const wsn::Listed &one) { return one.key < guess; });
    const int64_t lower = above - begin;
    if (rank >= lower && rank < lower + same_) {
      *tau = guess;
      return true;
    }
    const bool low = rank < lower;
    wsn::Listed *const wanted = low ? begin + rank : above + (rank - lower - same_);
    std::nth_element(low ? begin : above, wanted, low ? above : end,
                     [](const wsn::Listed &a, const wsn::Listed &b) { return a.key < b.key; });
    *tau = wanted->key;
    return true;
  }

  void gate_all(int threads) {
    const auto kernel = wsn::kernels().gate;
    const int64_t bytes = 2 * wsn::item_size(t_.dtype) + wsn::item_size(next_.masked_dtype);
    parallel_for(t_.n, bytes, threads, [&](int64_t begin, int64_t end) { kernel(gate_, begin, end); });
  }

  // At the threshold plus its drift, a running mean of how it moves; twice as wide as the last guess was wrong, and not
  // much narrower than before unless too many keys were inside.
  void choose_window(int64_t guess, int64_t tau) {
    const int64_t error = distance(guess, tau);
    next_.window[kHalfWidth] = std::max(2 * error, length_ > room_ ? half_ / 4 : half_ - half_ / 8);
    const int64_t moved = tau < before_ ? -distance(before_, tau) : distance(before_, tau);
    next_.window[kDrift] = drift_ + (moved - drift_) / 8;
  }

  // Up to a quarter of all keys, so that nothing overflows.
  int64_t distance(int64_t a, int64_t b) const {
    const uint64_t exact = a < b ? uint64_t(b) - uint64_t(a) : uint64_t(a) - uint64_t(b);
    return int64_t(std::min(exact, uint64_t(wsn::largest_key(gate_.scores.width) / 4)));
  }

  int64_t beyond(int64_t key, int64_t step) const {
    const int64_t least = wsn::smallest_key(gate_.scores.width), most = wsn::largest_key(gate_.scores.width);
    if (step < 0) return key < least - step ? least : key + step;
    return key > most - step ? most : key + step;
  }

  const wsn_gated &t_;
  const wsn_next &next_;
  int64_t room_;
  std::unique_ptr<wsn::Listed[]> list_;
  wsn::Gate gate_;
  int64_t before_ = 0, drift_ = 0, half_ = 0, lo_ = 0, hi_ = 0;
  std::atomic<int64_t> below_{0}, same_{0}, length_{0};
};

wsn::AdamWStep coefficients(const wsn_adamw &a) {
  const double correction1 = 1 - std::pow(a.beta1, double(a.step)), correction2 = 1 - std::pow(a.beta2, double(a.step));
  return {1 - a.beta1, a.beta2, 1 - a.beta2, std::sqrt(correction2), a.eps, a.lr / correction1,
          a.decoupled ? 1 - a.lr * a.weight_decay : 1.0, a.decoupled ? 0.0 : a.weight_decay};
}

wsn::SgdStep coefficients(const wsn_sgd &s) {
  return {s.lr, s.momentum, 1 - s.dampening, s.weight_decay, s.nesterov != 0, s.first != 0};
}

using AdamWUpdate = wsn::Update<wsn::AdamWStep>;
using SgdUpdate = wsn::Update<wsn::SgdStep>;

AdamWUpdate weight_update(const wsn_adamw_item &item) {
  return {{item.weight_avg, item.weight_avg_scales, item.weight_storage},
          {item.weight_avg_sq, item.weight_avg_sq_scales, item.weight_storage},
          coefficients(item.for_weight),
          uint32_t(item.for_weight.step)};
}
AdamWUpdate scores_update(const wsn_adamw_item &item) {
  return {{item.scores_avg, item.scores_avg_scales, item.scores_storage},
          {item.scores_avg_sq, item.scores_avg_sq_scales, item.scores_storage},
          coefficients(item.for_scores),
          uint32_t(item.for_scores.step)};
}
void *buffer(void *momentum, const wsn_sgd &step) { return step.momentum != 0 ? momentum : nullptr; }
SgdUpdate weight_update(const wsn_sgd_item &item) {
  return {{buffer(item.weight_momentum, item.for_weight), item.weight_momentum_scales, item.weight_storage},
          {nullptr, nullptr, item.weight_storage},
          coefficients(item.for_weight),
          uint32_t(item.for_weight.step)};
}
SgdUpdate scores_update(const wsn_sgd_item &item) {
  return {{buffer(item.scores_momentum, item.for_scores), item.scores_momentum_scales, item.scores_storage},
          {nullptr, nullptr, item.scores_storage},
          coefficients(item.for_scores),
          uint32_t(item.for_scores.step)};
}

int check_storage(int dtype, int storage) {
  if (storage < WSN_MEANS_PLAIN || storage > WSN_MEANS_8BIT) return WSN_ERROR_STORAGE;
  return storage != WSN_MEANS_PLAIN && dtype != WSN_FLOAT32 ? WSN_ERROR_DTYPE : WSN_OK;
}

// 8-bit means that are there have scales.
bool lacks_scales(int64_t n, int storage, const void *values, const float *scales) {
  return n > 0 && storage == WSN_MEANS_8BIT && values != nullptr && scales == nullptr;
}

template <class Item>
int check_storages(const Item &item) {
  if (const int code = check_storage(item.tensor.dtype, item.weight_storage)) return code;
  return check_storage(item.tensor.dtype, item.scores_storage);
}

int check_states(const wsn_adamw_item &item) {
  if (const int code = check_storages(item)) return code;
  const int64_t n = item.tensor.n;
  if (lacks_scales(n, item.weight_storage, item.weight_avg, item.weight_avg_scales) ||
      lacks_scales(n, item.weight_storage, item.weight_avg_sq, item.weight_avg_sq_scales) ||
      lacks_scales(n, item.scores_storage, item.scores_avg, item.scores_avg_scales) ||
      lacks_scales(n, item.scores_storage, item.scores_avg_sq, item.scores_avg_sq_scales))
    return WSN_ERROR_NULL;
  return wsn::check(n, 1, item.weight_avg, item.weight_avg_sq, item.scores_avg, item.scores_avg_sq);
}
int check_states(const wsn_sgd_item &item) {
  if (const int code = check_storages(item)) return code;
  if (lacks_scales(item.tensor.n, item.weight_storage, item.weight_momentum, item.weight_momentum_scales) ||
      lacks_scales(item.tensor.n, item.scores_storage, item.scores_momentum, item.scores_momentum_scales))
    return WSN_ERROR_NULL;
  const bool lacking = (item.for_weight.momentum != 0 && item.weight_momentum == nullptr) ||
                       (item.for_scores.momentum != 0 && item.scores_momentum == nullptr);
  return item.tensor.n > 0 && lacking ? WSN_ERROR_NULL : WSN_OK;
}

template <class Item, class Kernel>
void step_one(const Item &item, NextGate *next, Kernel kernel, int64_t bytes, int threads) {
  const wsn_gated &t = item.tensor;
  const Gradients gradients = gradients_of(t);
  const auto weight = weight_update(item), scores = scores_update(item);
  const bool speculates = next && next->begin();
  const Speculation speculation = speculates ? next->speculation() : Speculation();
  parallel_for(t.n, bytes * wsn::item_size(t.dtype), threads, [&](int64_t begin, int64_t end) {
    int64_t counts[2] = {};
    kernel(gradients, weight, scores, speculates ? &speculation : nullptr, begin, end, counts);
    if (speculates) next->count(counts);
  });
  if (next) next->finish(speculates, threads);
}

template <class Item, class Kernel>
int step_all(const Item *items, int64_t count, Kernel kernel, int64_t bytes, int threads) {
  if (const int code = wsn::check(count, threads, items)) return code;
  for (int64_t i = 0; i < count; ++i) {
    if (const int code = check_tensor(items[i].tensor, threads)) return code;
    if (const int code = check_next(items[i].tensor)) return code;
    if (const int code = check_states(items[i])) return code;
  }
  try {
    std::vector<std::unique_ptr<NextGate>> nexts{size_t(count)};  // before anything is written
    for (int64_t i = 0; i < count; ++i)
      if (items[i].tensor.next && items[i].tensor.n > 0) nexts[size_t(i)].reset(new NextGate(items[i].tensor));
    for (int64_t i = 0; i < count; ++i) step_one(items[i], nexts[size_t(i)].get(), kernel, bytes, threads);
  } catch (const std::bad_alloc &) {
    return WSN_ERROR_MEMORY;
  }
  return WSN_OK;
}

}  // namespace

int wsn_adamw_step(const wsn_adamw_item *items, int64_t count, int num_threads) {
  return step_all(items, count, wsn::kernels().adamw, 13, num_threads);
}

int wsn_sgd_step(const wsn_sgd_item *items, int64_t count, int num_threads) {
  return step_all(items, count, wsn::kernels().sgd, 9, num_threads);
}

int wsn_gradient_squares(const wsn_gated *tensors, int64_t count, double *out, int num_threads) {
  if (const int code = wsn::check(count, num_threads, tensors, out)) return code;
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (const int code = check_tensor(tensors[i], num_threads)) return code;
    most = std::max(most, (tensors[i].n + wsn::kBlock - 1) / wsn::kBlock);
  }
  // A sum per block, added up in their order: the same for any number of threads.
  const std::unique_ptr<double[]> sums(new (std::nothrow) double[size_t(2 * most)]);
  if (!sums) return WSN_ERROR_MEMORY;
  const auto kernel = wsn::kernels().squares;
  for (int64_t i = 0; i < count; ++i) {
    const wsn_gated &t = tensors[i];
    const Gradients gradients = gradients_of(t);
    parallel_for(t.n, 3 * wsn::item_size(t.dtype), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block += wsn::kBlock) {
        double *const sum = sums.get() + 2 * (block / wsn::kBlock);
        sum[0] = sum[1] = 0;
        kernel(gradients, block, std::min(end, block + wsn::kBlock), sum);
      }
    });
    out[2 * i] = out[2 * i + 1] = 0;
    for (int64_t block = 0; block * wsn::kBlock < t.n; ++block)
      out[2 * i] += sums[size_t(2 * block)], out[2 * i + 1] += sums[size_t(2 * block + 1)];
  }
  return WSN_OK;
}
