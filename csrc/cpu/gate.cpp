// The gate and its backward pass: arguments of the ABI to blocks of the kernels.
#include "checks.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "wsn_fast.h"

using wsn::Backward;
using wsn::check;
using wsn::Gate;
using wsn::is_dtype;
using wsn::is_rule;
using wsn::item_size;
using wsn::parallel_for;
using wsn::parallel_for_all;

namespace {

int run_gate(Gate gate, int64_t n, int num_threads) {
  gate.streams = gate.out && n * item_size(gate.out_dtype) >= wsn::kStreamedBytes;
  const auto kernel = wsn::kernels().gate;
  const int64_t bytes = gate.out ? item_size(gate.weight_dtype) + item_size(gate.out_dtype) + 4 : 4;
  parallel_for(n, bytes, num_threads, [&](int64_t begin, int64_t end) { kernel(gate, begin, end); });
  return WSN_OK;
}

int check_gate(const wsn_gate_item &t) {
  if (t.n < 1) return WSN_ERROR_SIZE;
  if (const int code = check(t.n, 1, t.weight, t.scores, t.tau, t.masked)) return code;
  if (!is_dtype(t.weight_dtype) || !is_dtype(t.scores_dtype) || !is_dtype(t.masked_dtype)) return WSN_ERROR_DTYPE;
  if (!is_rule(t.rule)) return WSN_ERROR_RULE;
  return t.rank < 0 || t.rank >= t.n ? WSN_ERROR_RANK : WSN_OK;
}

// The search goes through keys that fit the cache many times.
int64_t search_bytes(const wsn_gate_item &t) { return 8 * t.n * item_size(int(t.scores_dtype)); }

// Whether several threads have enough to do in the search of its threshold alone.
bool is_large(const wsn_gate_item &t) { return t.n * item_size(int(t.scores_dtype)) >= 2 * wsn::kBytesPerThread; }

void select_and_gate(const wsn_gate_item &t, int threads) {
  const wsn::Source source = wsn::source_of(t.scores, int(t.scores_dtype), int(t.rule));
  wsn::write_element(source, wsn::select(source, t.n, t.rank, threads), t.tau);
  run_gate({source, wsn::threshold_key(source, t.tau), nullptr, t.weight, int(t.weight_dtype), nullptr, nullptr,
            t.masked, int(t.masked_dtype)},
           t.n, threads);
}

int check_backward(const wsn_backward_item &t) {
  if (const int code = check(t.n, 1, t.grad, t.weight, t.scores)) return code;
  if (t.n > 0 && t.dweight != nullptr && t.tau == nullptr) return WSN_ERROR_NULL;
  if (!is_dtype(t.grad_dtype) || !is_dtype(t.weight_dtype) || !is_dtype(t.scores_dtype)) return WSN_ERROR_DTYPE;
  return is_rule(t.rule) ? WSN_OK : WSN_ERROR_RULE;
}

int64_t backward_bytes(const wsn_backward_item &t) {
  return t.n *
         (item_size(int(t.grad_dtype)) + 2 * item_size(int(t.weight_dtype)) + 2 * item_size(int(t.scores_dtype)));
}

Backward backward_of(const wsn_backward_item &t) {
  const int scores_dtype = int(t.scores_dtype), rule = int(t.rule);
  const wsn::Source source = wsn::source_of(t.scores, scores_dtype, rule);
  const int64_t key = t.n > 0 && t.dweight ? wsn::threshold_key(source, t.tau) : 0;
  const bool streams = t.n * item_size(int(t.weight_dtype)) >= wsn::kStreamedBytes;
  return {source,           key,         scores_dtype, rule,     t.grad, t.weight, int(t.grad_dtype),
          int(t.weight_dtype), t.union_mask, t.dweight,   t.dscores, streams};
}

}  // namespace

int64_t wsn::threshold_key(const Source &scores, const void *tau) {
  Source one = scores;
  one.data = tau;
  int64_t wide = 0;
  int32_t middle = 0;
  int16_t narrow = 0;
  void *const key = scores.width == 8 ? static_cast<void *>(&wide)
                    : scores.width == 4 ? static_cast<void *>(&middle)
                                        : static_cast<void *>(&narrow);
  kernels().sample(one, 1, 1, key);
  const int64_t value = scores.width == 8 ? wide : scores.width == 4 ? middle : narrow;
  return value > scores.infinity ? smallest_key(scores.width) : value;
}

int wsn_keep(const void *scores, int dtype, const void *tau, int rule, uint8_t *mask, uint8_t *packed, int64_t n,
             int num_threads) {
  if (const int code = check(n, num_threads, scores, tau)) return code;
  if (!is_dtype(dtype)) return WSN_ERROR_DTYPE;
  if (!is_rule(rule)) return WSN_ERROR_RULE;
  if (n == 0) return WSN_OK;
  const wsn::Source source = wsn::source_of(scores, dtype, rule);
  return run_gate({source, wsn::threshold_key(source, tau), nullptr, nullptr, 0, mask, packed, nullptr, 0}, n,
                  num_threads);
}

int wsn_gate(const void *weight, int weight_dtype, const void *scores, int scores_dtype, const void *tau, int rule,
             void *out, int out_dtype, uint8_t *packed, int64_t n, int num_threads) {
  if (const int code = check(n, num_threads, weight, scores, tau, out)) return code;
  if (!is_dtype(weight_dtype) || !is_dtype(scores_dtype) || !is_dtype(out_dtype)) return WSN_ERROR_DTYPE;
  if (!is_rule(rule)) return WSN_ERROR_RULE;
  if (n == 0) return WSN_OK;
  const wsn::Source source = wsn::source_of(scores, scores_dtype, rule);
  return run_gate(
      {source, wsn::threshold_key(source, tau), nullptr, weight, weight_dtype, nullptr, packed, out, out_dtype}, n,
      num_threads);
}

int wsn_gate_packed(const void *weight, int weight_dtype, const uint8_t *packed, void *out, int out_dtype, int64_t n,
                    int num_threads) {
  if (const int code = check(n, num_threads, weight, packed, out)) return code;
  if (!is_dtype(weight_dtype) || !is_dtype(out_dtype)) return WSN_ERROR_DTYPE;
  return run_gate({{}, 0, packed, weight, weight_dtype, nullptr, nullptr, out, out_dtype}, n, num_threads);
}

int wsn_gates(const wsn_gate_item *items, int64_t count, int num_threads) {
  if (const int code = check(count, num_threads, items)) return code;
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (const int code = check_gate(items[i])) return code;
    if (!is_large(items[i])) bytes += search_bytes(items[i]);
  }
  // The small tensors side by side, each in one thread; then the large ones one by one, each by all threads.
  const auto small = [](void *all, int64_t i) {
    const wsn_gate_item &item = static_cast<const wsn_gate_item *>(all)[i];
    if (!is_large(item)) select_and_gate(item, 1);
  };
  const int64_t threads = std::min<int64_t>(num_threads, bytes / wsn::kBytesPerThread);
  if (threads > 1)
    wsn::run_parts(small, const_cast<wsn_gate_item *>(items), count, int(threads));
  else
    for (int64_t i = 0; i < count; ++i) small(const_cast<wsn_gate_item *>(items), i);
  for (int64_t i = 0; i < count; ++i)
    if (is_large(items[i])) select_and_gate(items[i], num_threads);
  return WSN_OK;
}

int wsn_gate_backward(const void *grad, int grad_dtype, const void *weight, int weight_dtype, const void *scores,
                      int scores_dtype, const void *tau, int rule, const uint8_t *union_mask, void *dweight,
                      void *dscores, int64_t n, int num_threads) {
  const wsn_backward_item item = {grad, weight,     scores,       tau,          union_mask, dweight, dscores,
                                  n,    grad_dtype, weight_dtype, scores_dtype, rule};
  return wsn_gates_backward(&item, 1, num_threads);
}

int wsn_gates_backward(const wsn_backward_item *items, int64_t count, int num_threads) {
  if (const int code = check(count, num_threads, items)) return code;
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (const int code = check_backward(items[i])) return code;
    bytes += backward_bytes(items[i]);
  }
  const auto kernel = wsn::kernels().backward;
  parallel_for_all(
      count, bytes, num_threads, [&](int64_t i) { return items[i].n; },
      [&](int64_t i, int64_t begin, int64_t end) { kernel(backward_of(items[i]), begin, end); });
  return WSN_OK;
}
