/* The header is usable from C, and every function refuses what it must without writing anything. */
#include "wsn_fast.h"

#include <string.h>

#include "check.h"

static void check_version_and_messages(void) {
  int code, other;
  CHECK(wsn_abi_version() == WSN_ABI_VERSION);
  CHECK(strcmp(wsn_error_message(WSN_OK), "no error") == 0);
  CHECK(strcmp(wsn_error_message(12345), wsn_error_message(-1)) == 0);
  for (code = -1; code <= WSN_ERROR_STORAGE; ++code)
    for (other = -1; other < code; ++other) CHECK(strcmp(wsn_error_message(code), wsn_error_message(other)) != 0);
}

static void check_levels(void) {
  const int best = wsn_limit_instructions(-1);
  CHECK(best >= 0 && best <= 2);
  CHECK(wsn_limit_instructions(0) == 0);
  CHECK(wsn_limit_instructions(99) == best);
}

static void check_layout(void) {
  const uint8_t mask[11] = {1, 0, 0, 1, 0, 0, 0, 255, 0, 2, 1};
  const uint8_t other[2] = {0x02, 0x01};
  const uint8_t rows[6] = {0x01, 0x80, 0x02, 0x80, 0x04, 0x00};
  uint8_t packed[3] = {0, 0, 0xAA};
  uint8_t back[12];
  int64_t count = -1;
  int i;
  CHECK(wsn_pack_bits(mask, 11, packed, 1) == WSN_OK);
  CHECK(packed[0] == 0x89 && packed[1] == 0x06); /* least significant first, padding zero, any non-zero byte is 1 */
  CHECK(packed[2] == 0xAA);                      /* nothing written past the end */
  CHECK(wsn_popcount_bits(packed, 2, &count, 1) == WSN_OK && count == 5);
  memset(back, 0xAA, sizeof back);
  CHECK(wsn_unpack_bits(packed, 11, back, 1) == WSN_OK);
  for (i = 0; i < 11; ++i) CHECK(back[i] == (mask[i] != 0));
  CHECK(back[11] == 0xAA);
  CHECK(wsn_or_bits(packed, other, 2, 1) == WSN_OK && packed[0] == 0x8B && packed[1] == 0x07);
  CHECK(wsn_union_bits(rows, 3, 2, packed, 1) == WSN_OK && packed[0] == 0x07 && packed[1] == 0x80);
}

static void check_errors_of_bits(void) {
  uint8_t a[1] = {0}, b[1] = {0};
  int64_t count = 7;
  CHECK(wsn_pack_bits(NULL, 1, b, 1) == WSN_ERROR_NULL);
  CHECK(wsn_pack_bits(a, 1, NULL, 1) == WSN_ERROR_NULL);
  CHECK(wsn_pack_bits(a, -1, b, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_pack_bits(a, 1, b, 0) == WSN_ERROR_THREADS);
  CHECK(wsn_unpack_bits(NULL, 1, b, 1) == WSN_ERROR_NULL);
  CHECK(wsn_unpack_bits(a, -1, b, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_or_bits(a, NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_or_bits(a, b, 1, -3) == WSN_ERROR_THREADS);
  CHECK(wsn_union_bits(a, 0, 1, b, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_union_bits(a, 1, 1, NULL, 1) == WSN_ERROR_NULL);
  CHECK(wsn_popcount_bits(NULL, 1, &count, 1) == WSN_ERROR_NULL);
  CHECK(wsn_popcount_bits(a, 1, NULL, 1) == WSN_ERROR_NULL);
  CHECK(wsn_popcount_bits(a, -1, &count, 1) == WSN_ERROR_SIZE);
  CHECK(count == 7);
}

static void check_errors_of_gate(void) {
  float x[1] = {1}, tau = 7, out[1] = {7};
  uint8_t bits[1] = {0};
  CHECK(wsn_threshold(x, WSN_FLOAT32, 0, 0, 0, &tau, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_threshold(x, WSN_FLOAT32, 1, 1, 0, &tau, 1) == WSN_ERROR_RANK);
  CHECK(wsn_threshold(x, WSN_FLOAT32, 1, -1, 0, &tau, 1) == WSN_ERROR_RANK);
  CHECK(wsn_threshold(x, 4, 1, 0, 0, &tau, 1) == WSN_ERROR_DTYPE);
  CHECK(wsn_threshold(x, -1, 1, 0, 0, &tau, 1) == WSN_ERROR_DTYPE);
  CHECK(wsn_threshold(x, WSN_FLOAT32, 1, 0, 2, &tau, 1) == WSN_ERROR_RULE);
  CHECK(wsn_threshold(x, WSN_FLOAT32, 1, 0, 0, &tau, 0) == WSN_ERROR_THREADS);
  CHECK(wsn_threshold(NULL, WSN_FLOAT32, 1, 0, 0, &tau, 1) == WSN_ERROR_NULL);
  CHECK(wsn_threshold(x, WSN_FLOAT32, 1, 0, 0, NULL, 1) == WSN_ERROR_NULL);
  CHECK(wsn_keep(x, WSN_FLOAT32, NULL, 0, bits, NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_keep(x, 9, x, 0, bits, NULL, 1, 1) == WSN_ERROR_DTYPE);
  CHECK(wsn_gate(x, 0, x, 0, x, 0, NULL, 0, NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gate(x, 0, x, 0, x, 5, out, 0, NULL, 1, 1) == WSN_ERROR_RULE);
  CHECK(wsn_gate(x, 0, x, 0, x, 0, out, 4, NULL, 1, 1) == WSN_ERROR_DTYPE);
  CHECK(wsn_gate_packed(x, 0, NULL, out, 0, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gate_packed(x, 0, bits, out, 0, -1, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_gate_backward(x, 0, x, 0, x, 0, NULL, 0, NULL, out, NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gate_backward(x, 0, x, 0, x, 0, NULL, 0, NULL, NULL, out, 1, 0) == WSN_ERROR_THREADS);
  CHECK(wsn_restore_frozen(out, x, bits, 3, 1, 1) == WSN_ERROR_DTYPE);
  CHECK(wsn_restore_frozen(out, NULL, bits, 4, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_restore_frozen(out, x, NULL, 4, 1, 1) == WSN_ERROR_NULL);
  CHECK(tau == 7 && out[0] == 7);
}

/* An error in the last item is found before anything is written for the first. */
static void check_errors_of_many(void) {
  float x[1] = {1}, tau = 7, masked = 7, dw = 7, ds = 7;
  const wsn_gate_item gate = {x, x, &tau, &masked, 1, 0, WSN_FLOAT32, WSN_FLOAT32, WSN_FLOAT32, WSN_VALUE};
  const wsn_backward_item good = {x, x, x, x, NULL, &dw, &ds, 1, WSN_FLOAT32, WSN_FLOAT32, WSN_FLOAT32, WSN_VALUE};
  wsn_gate_item g[2] = {gate, gate};
  wsn_backward_item b[2] = {good, good};
  CHECK(sizeof(wsn_gate_item) == 10 * sizeof(int64_t) && sizeof(wsn_backward_item) == 12 * sizeof(int64_t));
  CHECK(wsn_gates(NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gates(g, -1, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_gates(g, 2, 0) == WSN_ERROR_THREADS);
  g[1].n = 0;
  CHECK(wsn_gates(g, 2, 1) == WSN_ERROR_SIZE);
  g[1] = gate, g[1].rank = 1;
  CHECK(wsn_gates(g, 2, 1) == WSN_ERROR_RANK);
  g[1].rank = -1;
  CHECK(wsn_gates(g, 2, 1) == WSN_ERROR_RANK);
  g[1] = gate, g[1].masked = NULL;
  CHECK(wsn_gates(g, 2, 1) == WSN_ERROR_NULL);
  g[1] = gate, g[1].masked_dtype = (int64_t)1 << 32; /* not cut to 32 bits */
  CHECK(wsn_gates(g, 2, 1) == WSN_ERROR_DTYPE);
  g[1] = gate, g[1].rule = 2;
  CHECK(wsn_gates(g, 2, 1) == WSN_ERROR_RULE);
  CHECK(wsn_gates_backward(NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gates_backward(b, -1, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_gates_backward(b, 2, 0) == WSN_ERROR_THREADS);
  b[1].n = -1;
  CHECK(wsn_gates_backward(b, 2, 1) == WSN_ERROR_SIZE);
  b[1] = good, b[1].tau = NULL;
  CHECK(wsn_gates_backward(b, 2, 1) == WSN_ERROR_NULL);
  b[1] = good, b[1].grad = NULL;
  CHECK(wsn_gates_backward(b, 2, 1) == WSN_ERROR_NULL);
  b[1] = good, b[1].grad_dtype = 4;
  CHECK(wsn_gates_backward(b, 2, 1) == WSN_ERROR_DTYPE);
  b[1] = good, b[1].rule = (int64_t)1 << 32;
  CHECK(wsn_gates_backward(b, 2, 1) == WSN_ERROR_RULE);
  CHECK(tau == 7 && masked == 7 && dw == 7 && ds == 7);
  b[1] = good, b[1].tau = NULL, b[1].dweight = NULL; /* tau is not read then */
  CHECK(wsn_gates_backward(b, 2, 1) == WSN_OK && dw == 1 && ds == 1);
  CHECK(wsn_gates(g, 1, 1) == WSN_OK && tau == 1 && masked == 1);
}

static void check_errors_of_steps(void) {
  float x[1] = {1}, w[1] = {7}, state[1] = {0}, masked[1] = {7};
  int64_t window[WSN_WINDOW] = {0};
  double sums[2] = {7, 7};
  const wsn_adamw adamw = {1e-3, 0.9, 0.999, 1e-8, 0, 1, 1};
  const wsn_sgd sgd = {0.1, 0.9, 0, 0, 0, 1, 1};
  const wsn_gated good = {x, NULL, w, w, x, NULL, NULL, 1, 1.0, WSN_FLOAT32, WSN_FLOAT32, WSN_VALUE};
  const wsn_adamw_item fine = {good, state, state, state, state, adamw, adamw, NULL, NULL, NULL, NULL, 0, 0};
  wsn_adamw_item a[2];
  wsn_sgd_item s = {good, state, state, sgd, sgd, NULL, NULL, 0, 0};
  wsn_next next = {masked, x, window, 0, WSN_FLOAT32};
  a[0] = a[1] = fine;
  CHECK(wsn_adamw_step(NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_adamw_step(a, -1, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_adamw_step(a, 2, 0) == WSN_ERROR_THREADS);
  a[1].weight_avg_sq = NULL; /* an error in the last is found before the first is changed */
  CHECK(wsn_adamw_step(a, 2, 1) == WSN_ERROR_NULL);
  s.weight_momentum = NULL;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_NULL);
  s.weight_momentum = state, s.tensor.dtype = WSN_BFLOAT16;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_DTYPE);
  s.tensor = good, s.tensor.grad_dtype = 4;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_DTYPE);
  s.tensor = good, s.tensor.score_grad = x, s.tensor.grad_dtype = WSN_BFLOAT16;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_DTYPE);
  s.tensor = good, s.tensor.tau = NULL;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gradient_squares(&s.tensor, 1, sums, 1) == WSN_ERROR_NULL);
  s.tensor = good, s.tensor.rule = 2;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_RULE);
  s.tensor = good, s.tensor.n = -1;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_SIZE);
  s.tensor = good, s.tensor.next = &next, next.rank = 1;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_RANK);
  next.rank = 0, next.masked_dtype = -1;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_DTYPE);
  next.masked_dtype = WSN_FLOAT32, next.window = NULL;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_gradient_squares(&good, 1, NULL, 1) == WSN_ERROR_NULL);
  s.tensor = good, s.weight_storage = 3;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_STORAGE);
  s.weight_storage = WSN_MEANS_PLAIN, s.scores_storage = WSN_MEANS_8BIT; /* without scales */
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_NULL);
  s.tensor.dtype = s.tensor.grad_dtype = WSN_FLOAT64;
  CHECK(wsn_sgd_step(&s, 1, 1) == WSN_ERROR_DTYPE);
  a[1].weight_avg_sq = state, a[1].weight_storage = WSN_MEANS_8BIT;
  CHECK(wsn_adamw_step(a, 2, 1) == WSN_ERROR_NULL);
  a[1].weight_storage = -1;
  CHECK(wsn_adamw_step(a, 2, 1) == WSN_ERROR_STORAGE);
  CHECK(w[0] == 7 && state[0] == 0 && masked[0] == 7 && window[0] == 0 && sums[0] == 7);
}

static void check_errors_of_restoring(void) {
  float x[1] = {1}, w[1] = {7};
  uint8_t bits[1] = {1};
  const wsn_restore_item good = {w, x, bits, 4, 1};
  wsn_restore_item items[2];
  items[0] = items[1] = good; /* an error in the last is found before the first is changed */
  CHECK(sizeof(wsn_restore_item) == 5 * sizeof(int64_t));
  CHECK(wsn_restore_frozen_many(NULL, 1, 1) == WSN_ERROR_NULL);
  CHECK(wsn_restore_frozen_many(items, -1, 1) == WSN_ERROR_SIZE);
  CHECK(wsn_restore_frozen_many(items, 2, 0) == WSN_ERROR_THREADS);
  items[1].itemsize = 16;
  CHECK(wsn_restore_frozen_many(items, 2, 1) == WSN_ERROR_DTYPE);
  items[1].itemsize = ((int64_t)1 << 32) + 4; /* not cut to 32 bits */
  CHECK(wsn_restore_frozen_many(items, 2, 1) == WSN_ERROR_DTYPE);
  items[1] = good, items[1].n = -1;
  CHECK(wsn_restore_frozen_many(items, 2, 1) == WSN_ERROR_SIZE);
  items[1] = good, items[1].saved = NULL;
  CHECK(wsn_restore_frozen_many(items, 2, 1) == WSN_ERROR_NULL);
  CHECK(w[0] == 7);
}

static void check_empty(void) {
  const wsn_gated none = {NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 1.0, WSN_FLOAT32, WSN_FLOAT32, WSN_VALUE};
  const wsn_adamw adamw = {1e-3, 0.9, 0.999, 1e-8, 0, 1, 1};
  const wsn_adamw_item item = {none, NULL, NULL, NULL, NULL, adamw, adamw, NULL, NULL, NULL, NULL, 0, 0};
  const wsn_restore_item nothing = {NULL, NULL, NULL, 4, 0};
  const wsn_backward_item empty = {NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0};
  double sums[2] = {7, 7};
  int64_t count = -1;
  CHECK(wsn_pack_bits(NULL, 0, NULL, 1) == WSN_OK);
  CHECK(wsn_unpack_bits(NULL, 0, NULL, 1) == WSN_OK);
  CHECK(wsn_or_bits(NULL, NULL, 0, 1) == WSN_OK);
  CHECK(wsn_union_bits(NULL, 2, 0, NULL, 1) == WSN_OK);
  CHECK(wsn_popcount_bits(NULL, 0, &count, 1) == WSN_OK && count == 0);
  CHECK(wsn_keep(NULL, 0, NULL, 0, NULL, NULL, 0, 1) == WSN_OK);
  CHECK(wsn_gate(NULL, 0, NULL, 0, NULL, 0, NULL, 0, NULL, 0, 1) == WSN_OK);
  CHECK(wsn_gate_packed(NULL, 0, NULL, NULL, 0, 0, 1) == WSN_OK);
  CHECK(wsn_gate_backward(NULL, 0, NULL, 0, NULL, 0, NULL, 0, NULL, NULL, NULL, 0, 1) == WSN_OK);
  CHECK(wsn_gates(NULL, 0, 1) == WSN_OK);
  CHECK(wsn_gates_backward(NULL, 0, 1) == WSN_OK);
  CHECK(wsn_gates_backward(&empty, 1, 1) == WSN_OK);
  CHECK(wsn_restore_frozen(NULL, NULL, NULL, 4, 0, 1) == WSN_OK);
  CHECK(wsn_restore_frozen_many(&nothing, 1, 1) == WSN_OK);
  CHECK(wsn_restore_frozen_many(NULL, 0, 1) == WSN_OK);
  CHECK(wsn_adamw_step(&item, 1, 1) == WSN_OK);
  CHECK(wsn_adamw_step(NULL, 0, 1) == WSN_OK);
  CHECK(wsn_gradient_squares(&none, 1, sums, 1) == WSN_OK && sums[0] == 0 && sums[1] == 0);
}

int main(void) {
  check_version_and_messages();
  check_levels();
  check_layout();
  check_errors_of_bits();
  check_errors_of_gate();
  check_errors_of_many();
  check_errors_of_steps();
  check_errors_of_restoring();
  check_empty();
  return report();
}
