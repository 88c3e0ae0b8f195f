// The gate and the optimizer steps: arguments of the ABI to blocks of the kernels.
#include <cmath>

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

// The part of the optimizer steps that they share with the backward pass, or an error.
int backward_of(const wsn_gated *tensor, int num_threads, Backward *out) {
  if (tensor == nullptr) return WSN_ERROR_NULL;
  const wsn_gated &t = *tensor;
  if (const int code = check(t.n, num_threads, t.grad, t.weight, t.scores, t.tau)) return code;
  if (t.dtype != WSN_FLOAT32 && t.dtype != WSN_FLOAT64) return WSN_ERROR_DTYPE;
  if (!is_rule(t.rule)) return WSN_ERROR_RULE;
  const wsn::Source scores = wsn::source_of(t.scores, t.dtype, t.rule);
  const int64_t tau = t.n > 0 ? wsn::threshold_key(scores, t.tau) : 0;
  *out = {scores, tau, t.dtype, t.rule, t.grad, t.weight, t.dtype, t.dtype, t.union_mask, nullptr, nullptr};
  return WSN_OK;
}

wsn::AdamWStep coefficients(const wsn_adamw &a) {
  const double correction1 = 1 - std::pow(a.beta1, double(a.step)), correction2 = 1 - std::pow(a.beta2, double(a.step));
  return {1 - a.beta1, a.beta2, 1 - a.beta2, std::sqrt(correction2), a.eps, a.lr / correction1,
          a.decoupled ? 1 - a.lr * a.weight_decay : 1.0, a.decoupled ? 0.0 : a.weight_decay};
}

wsn::SgdStep coefficients(const wsn_sgd &s) {
  return {s.lr, s.momentum, 1 - s.dampening, s.weight_decay, s.nesterov != 0, s.first != 0};
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

int wsn_adamw_step(const wsn_gated *tensor, void *weight_avg, void *weight_avg_sq, void *scores_avg,
                   void *scores_avg_sq, const wsn_adamw *for_weight, const wsn_adamw *for_scores, int num_threads) {
  Backward args;
  if (const int code = backward_of(tensor, num_threads, &args)) return code;
  if (const int code = check(tensor->n, 1, weight_avg, weight_avg_sq, scores_avg, scores_avg_sq)) return code;
  if (for_weight == nullptr || for_scores == nullptr) return WSN_ERROR_NULL;
  const wsn::Update<wsn::AdamWStep> weight = {weight_avg, weight_avg_sq, coefficients(*for_weight)};
  const wsn::Update<wsn::AdamWStep> scores = {scores_avg, scores_avg_sq, coefficients(*for_scores)};
  const auto kernel = wsn::kernels().adamw;
  parallel_for(tensor->n, 13 * item_size(tensor->dtype), num_threads,
               [&](int64_t begin, int64_t end) { kernel(args, weight, scores, begin, end); });
  return WSN_OK;
}

int wsn_sgd_step(const wsn_gated *tensor, void *weight_momentum, void *scores_momentum, const wsn_sgd *for_weight,
                 const wsn_sgd *for_scores, int num_threads) {
  Backward args;
  if (const int code = backward_of(tensor, num_threads, &args)) return code;
  if (for_weight == nullptr || for_scores == nullptr) return WSN_ERROR_NULL;
  const bool lacking = (for_weight->momentum != 0 && weight_momentum == nullptr) ||
                       (for_scores->momentum != 0 && scores_momentum == nullptr);
  if (tensor->n > 0 && lacking) return WSN_ERROR_NULL;
  const auto buffer = [](void *momentum, const wsn_sgd *step) { return step->momentum != 0 ? momentum : nullptr; };
  const wsn::Update<wsn::SgdStep> weight = {buffer(weight_momentum, for_weight), nullptr, coefficients(*for_weight)};
  const wsn::Update<wsn::SgdStep> scores = {buffer(scores_momentum, for_scores), nullptr, coefficients(*for_scores)};
  const auto kernel = wsn::kernels().sgd;
  parallel_for(tensor->n, 9 * item_size(tensor->dtype), num_threads,
               [&](int64_t begin, int64_t end) { kernel(args, weight, scores, begin, end); });
  return WSN_OK;
}
