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

namespace {

int run_gate(const Gate &gate, int64_t n, int num_threads) {
  const auto kernel = wsn::kernels().gate;
  const int64_t bytes = gate.out ? item_size(gate.weight_dtype) + item_size(gate.out_dtype) + 4 : 4;
  parallel_for(n, bytes, num_threads, [&](int64_t begin, int64_t end) { kernel(gate, begin, end); });
  return WSN_OK;
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

int wsn_gate_backward(const void *grad, int grad_dtype, const void *weight, int weight_dtype, const void *scores,
                      int scores_dtype, const void *tau, int rule, const uint8_t *union_mask, void *dweight,
                      void *dscores, int64_t n, int num_threads) {
  if (const int code = check(n, num_threads, grad, weight, scores)) return code;
  if (n > 0 && dweight != nullptr && tau == nullptr) return WSN_ERROR_NULL;
  if (!is_dtype(grad_dtype) || !is_dtype(weight_dtype) || !is_dtype(scores_dtype)) return WSN_ERROR_DTYPE;
  if (!is_rule(rule)) return WSN_ERROR_RULE;
  const wsn::Source source = wsn::source_of(scores, scores_dtype, rule);
  const int64_t key = n > 0 && dweight ? wsn::threshold_key(source, tau) : 0;
  const Backward args = {source,       key,        scores_dtype, rule,    grad,   weight, grad_dtype,
                         weight_dtype, union_mask, dweight,      dscores};
  const auto kernel = wsn::kernels().backward;
  const int64_t bytes = item_size(grad_dtype) + 2 * item_size(weight_dtype) + 2 * item_size(scores_dtype);
  parallel_for(n, bytes, num_threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return WSN_OK;
}
