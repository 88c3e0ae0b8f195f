/* Every function on sizes 0..70 and around a block, on buffers that end where they must and start at odd addresses, at
 * every level of instructions: float32 against loops a reader can check, every dtype against the plain level. */
#include "wsn_fast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static const int64_t kSizes[] = {1023, 1024, 1025, 3001, 9001};
static const int kItem[] = {4, 8, 2, 2};
static uint64_t state = 1;

static uint64_t next_random(void) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

/* Exactly size bytes, starting at an address that is `offset` past an aligned one. */
typedef struct buffer {
  uint8_t *base, *data;
} buffer;

static buffer make(int64_t size, int offset) {
  buffer b;
  if (size < 0 || size > INT32_MAX) abort();
  b.base = malloc((size_t)(size + offset) + (size + offset == 0));
  b.data = b.base + offset;
  memset(b.data, 0xAA, (size_t)size);
  return b;
}

/* Numbers of all kinds: ordinary ones of few values (ties), zeros of both signs, infinities, NaN, denormals. */
static buffer make_numbers(int dtype, int64_t n, int offset) {
  static const uint64_t kSpecial[4][6] = {
      {0, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 3},
      {0, 0x8000000000000000, 0x7ff0000000000000, 0xfff0000000000000, 0xfff8000000000000, 5},
      {0, 0x8000, 0x7f80, 0xff80, 0xffc0, 0x8001},
      {0, 0x8000, 0x7c00, 0xfc00, 0x7e00, 7}};
  static const uint64_t kOrdinary[4] = {0x3f000000, 0x3fe0000000000000, 0x3f00, 0x3800};
  buffer b = make(n * kItem[dtype], offset);
  int64_t i;
  for (i = 0; i < n; ++i) {
    const uint64_t r = next_random();
    uint64_t bits = kOrdinary[dtype] ^ (r >> 40 & 0xff) ^ (r >> 60 & 1) << (8 * kItem[dtype] - 1);
    uint8_t *const to = b.data + i * kItem[dtype];
    if (r % 8 == 0) bits = kSpecial[dtype][(r >> 8) % 6];
    if (kItem[dtype] == 8) {
      memcpy(to, &bits, 8);
    } else if (kItem[dtype] == 4) {
      const uint32_t narrow = (uint32_t)bits;
      memcpy(to, &narrow, 4);
    } else {
      const uint16_t narrow = (uint16_t)bits;
      memcpy(to, &narrow, 2);
    }
  }
  return b;
}

static buffer make_bits(int64_t n, int offset) {
  buffer b = make((n + 7) / 8, offset);
  int64_t i;
  for (i = 0; i < (n + 7) / 8; ++i) b.data[i] = (uint8_t)next_random();
  return b;
}

static float float_at(const void *data, int64_t i) {
  float x;
  memcpy(&x, (const uint8_t *)data + 4 * i, 4);
  return x;
}

static int bit_at(const uint8_t *packed, int64_t i) { return packed[i / 8] >> (i % 8) & 1; }

static int is_kept(const void *scores, int64_t i, float tau, int rule) {
  const float s = float_at(scores, i);
  return !((rule == WSN_MAGNITUDE ? fabsf(s) : s) < tau);
}

static int same_float(float a, float b) { return memcmp(&a, &b, 4) == 0 || (a != a && b != b); }

/* The rank of tau among the keys: fewer than or as many as `rank` below it, more than `rank` below or equal. */
static int has_rank(const void *scores, int64_t n, int rule, float tau, int64_t rank) {
  int64_t below = 0, upto = 0, i;
  for (i = 0; i < n; ++i) {
    const float s = float_at(scores, i), key = rule == WSN_MAGNITUDE ? fabsf(s) : s;
    below += tau != tau ? key == key : key < tau;
    upto += tau != tau ? 1 : key <= tau;
  }
  return below <= rank && rank < upto;
}

static void check_float32(int64_t n, int rule, int offset) {
  buffer w = make_numbers(0, n, offset), s = make_numbers(0, n, offset), g = make_numbers(0, n, offset);
  buffer u = make_bits(n, offset), packed = make((n + 7) / 8, offset), mask = make(n, 0);
  buffer out = make(4 * n, offset), dw = make(4 * n, offset), ds = make(4 * n, offset);
  const int64_t rank = n ? (int64_t)(next_random() % (uint64_t)n) : 0;
  float tau = 0;
  int64_t i;
  if (n) {
    CHECK(wsn_threshold(s.data, 0, n, rank, rule, &tau, 2) == WSN_OK);
    CHECK(has_rank(s.data, n, rule, tau, rank));
  }
  CHECK(wsn_keep(s.data, 0, &tau, rule, mask.data, NULL, n, 2) == WSN_OK);
  CHECK(wsn_gate(w.data, 0, s.data, 0, &tau, rule, out.data, 0, packed.data, n, 2) == WSN_OK);
  CHECK(wsn_gate_backward(g.data, 0, w.data, 0, s.data, 0, &tau, rule, u.data, dw.data, ds.data, n, 2) == WSN_OK);
  for (i = 0; i < n; ++i) {
    const int kept = is_kept(s.data, i, tau, rule), trained = kept && !bit_at(u.data, i);
    const float score = float_at(s.data, i), sign = (float)((score > 0) - (score < 0));
    const float product = float_at(g.data, i) * float_at(w.data, i);
    CHECK(mask.data[i] == kept && bit_at(packed.data, i) == kept);
    CHECK(same_float(float_at(out.data, i), kept ? float_at(w.data, i) : 0.0f));
    CHECK(same_float(float_at(dw.data, i), trained ? float_at(g.data, i) : 0.0f));
    CHECK(same_float(float_at(ds.data, i), rule == WSN_MAGNITUDE ? product * sign : product));
  }
  if (n % 8) CHECK(packed.data[n / 8] >> (n % 8) == 0);
  CHECK(wsn_gate_packed(w.data, 0, packed.data, dw.data, 0, n, 2) == WSN_OK);
  CHECK(memcmp(dw.data, out.data, (size_t)(4 * n)) == 0);
  free(w.base), free(s.base), free(g.base), free(u.base), free(packed.base), free(mask.base);
  free(out.base), free(dw.base), free(ds.base);
}

/* What a call wrote: its outputs of all dtypes, one after the other, for comparison between levels. */
static void run_dtypes(int dtype, int out_dtype, int64_t n, int offset, int level, buffer *result) {
  const int item = kItem[dtype], out_item = kItem[out_dtype];
  const uint64_t before = state;
  buffer w = make_numbers(dtype, n, offset), s = make_numbers(dtype, n, offset);
  buffer g = make_numbers(out_dtype, n, offset), u = make_bits(n, offset);
  buffer all = make(n * (out_item + 2 * item) + 8, offset);
  uint8_t *const dw = all.data + n * out_item, *const ds = dw + n * item, *const tau = ds + n * item;
  CHECK(wsn_limit_instructions(level) == level);
  memset(tau, 0, 8);
  if (n) CHECK(wsn_threshold(s.data, dtype, n, n / 2, WSN_VALUE, tau, 1) == WSN_OK);
  CHECK(wsn_gate(w.data, dtype, s.data, dtype, tau, WSN_VALUE, all.data, out_dtype, NULL, n, 1) == WSN_OK);
  CHECK(wsn_gate_backward(g.data, out_dtype, w.data, dtype, s.data, dtype, tau, WSN_MAGNITUDE, u.data, dw, ds, n, 1) ==
        WSN_OK);
  free(w.base), free(s.base), free(g.base), free(u.base);
  *result = all;
  state = before; /* the same numbers for the next level */
}

/* NaN bits are nobody's promise: make them all alike. */
static void unify_nan(int dtype, uint8_t *data, int64_t n) {
  static const uint64_t kInfinity[4] = {0x7f800000, 0x7ff0000000000000, 0x7f80, 0x7c00};
  int64_t i;
  for (i = 0; i < n; ++i) {
    uint8_t *const element = data + i * kItem[dtype];
    uint64_t wide = 0;
    uint32_t middle;
    uint16_t narrow;
    if (kItem[dtype] == 8) memcpy(&wide, element, 8);
    if (kItem[dtype] == 4) memcpy(&middle, element, 4), wide = middle;
    if (kItem[dtype] == 2) memcpy(&narrow, element, 2), wide = narrow;
    wide &= ((uint64_t)1 << (8 * kItem[dtype] - 1)) - 1;
    if (wide > kInfinity[dtype]) memset(element, 0xff, (size_t)kItem[dtype]);
  }
}

static void check_dtypes(int64_t n, int offset, int best) {
  int dtype, out_dtype, level;
  for (dtype = 0; dtype < 4; ++dtype) {
    for (out_dtype = 0; out_dtype < 4; ++out_dtype) {
      buffer plain, other;
      run_dtypes(dtype, out_dtype, n, offset, 0, &plain);
      unify_nan(out_dtype, plain.data, n), unify_nan(dtype, plain.data + n * kItem[out_dtype], 2 * n);
      for (level = 1; level <= best; ++level) {
        run_dtypes(dtype, out_dtype, n, offset, level, &other);
        unify_nan(out_dtype, other.data, n), unify_nan(dtype, other.data + n * kItem[out_dtype], 2 * n);
        CHECK(memcmp(plain.data, other.data, (size_t)(n * (kItem[out_dtype] + 2 * kItem[dtype]) + 8)) == 0);
        free(other.base);
      }
      free(plain.base);
      (void)next_random();
    }
  }
}

/* Four tensors of sizes around n in one call: what the calls for one tensor give. */
static void check_many(int64_t n, int offset) {
  enum { kCount = 4 };
  const int64_t sizes[kCount] = {n, 1, n / 2, n + 7};
  buffer inputs[kCount][4], outputs[kCount][3], expected[kCount][3];
  wsn_gate_item gates[kCount];
  wsn_backward_item items[kCount];
  double taus[kCount][2];
  int64_t i, filled = 0;
  int k;
  for (i = 0; i < kCount; ++i) {
    const int64_t size = sizes[i];
    const int dtype = (int)(i % 2), rule = (int)(i / 2 % 2), item = kItem[dtype];
    for (k = 0; k < 3; ++k) inputs[i][k] = make_numbers(k == 0 ? WSN_BFLOAT16 : dtype, size, offset);
    inputs[i][3] = make_bits(size, offset);
    for (k = 0; k < 3; ++k) outputs[i][k] = make(size * item, offset), expected[i][k] = make(size * item, 0);
    {
      const wsn_backward_item one = {inputs[i][0].data, inputs[i][1].data, inputs[i][2].data, taus[i],
                                     i == 3 ? NULL : inputs[i][3].data, outputs[i][0].data,
                                     i == 2 ? NULL : outputs[i][1].data, size, WSN_BFLOAT16, dtype, dtype, rule};
      const wsn_gate_item gate = {inputs[i][1].data, inputs[i][2].data, taus[i], outputs[i][2].data,
                                  size, size / 2, dtype, dtype, dtype, rule};
      items[i] = one;
      if (size) gates[filled++] = gate;
    }
    memset(taus[i], 0, sizeof taus[i]);
    if (size) CHECK(wsn_threshold(inputs[i][2].data, dtype, size, size / 2, rule, taus[i] + 1, 1) == WSN_OK);
    CHECK(wsn_gate(inputs[i][1].data, dtype, inputs[i][2].data, dtype, taus[i] + 1, rule, expected[i][2].data, dtype,
                   NULL, size, 1) == WSN_OK);
    CHECK(wsn_gate_backward(inputs[i][0].data, WSN_BFLOAT16, inputs[i][1].data, dtype, inputs[i][2].data, dtype,
                            taus[i] + 1, rule, items[i].union_mask, expected[i][0].data,
                            i == 2 ? NULL : expected[i][1].data, size, 1) == WSN_OK);
  }
  CHECK(wsn_gates(gates, filled, 2) == WSN_OK);
  CHECK(wsn_gates_backward(items, kCount, 2) == WSN_OK);
  for (i = 0; i < kCount; ++i) {
    const int64_t bytes = sizes[i] * kItem[i % 2];
    CHECK(memcmp(taus[i], taus[i] + 1, (size_t)kItem[i % 2]) == 0);
    for (k = 0; k < 3; ++k) {
      CHECK(memcmp(outputs[i][k].data, expected[i][k].data, (size_t)bytes) == 0);
      free(outputs[i][k].base), free(expected[i][k].base);
    }
    for (k = 0; k < 4; ++k) free(inputs[i][k].base);
  }
}

static void check_bits(int64_t n, int offset) {
  buffer mask = make(n, offset), packed = make((n + 7) / 8, offset), back = make(n, offset);
  buffer rows = make_bits(3 * 8 * n, offset), joined = make(n, offset);
  int64_t i, count = 0, expected = 0;
  for (i = 0; i < n; ++i) mask.data[i] = (uint8_t)(next_random() % 3 % 2), expected += mask.data[i];
  CHECK(wsn_pack_bits(mask.data, n, packed.data, 2) == WSN_OK);
  CHECK(wsn_unpack_bits(packed.data, n, back.data, 2) == WSN_OK);
  CHECK(memcmp(mask.data, back.data, (size_t)n) == 0);
  CHECK(wsn_popcount_bits(packed.data, (n + 7) / 8, &count, 2) == WSN_OK && count == expected);
  CHECK(wsn_union_bits(rows.data, 3, n, joined.data, 2) == WSN_OK);
  for (i = 0; i < n; ++i) CHECK(joined.data[i] == (rows.data[i] | rows.data[n + i] | rows.data[2 * n + i]));
  CHECK(wsn_or_bits(mask.data, back.data, n, 2) == WSN_OK && memcmp(mask.data, back.data, (size_t)n) == 0);
  free(mask.base), free(packed.base), free(back.base), free(rows.base), free(joined.base);
}

/* Every item size in one call, first where a union has its bits set, then everywhere. */
static void check_restore_many(int64_t n, int offset) {
  buffer param[8], saved[8], u = make_bits(n, offset);
  wsn_restore_item items[8];
  int64_t i;
  int j, k, wrong = 0;
  for (j = 0; j < 8; ++j) {
    const int item = 1 << j % 4;
    param[j] = make(n * item, offset), saved[j] = make_bits(8 * n * item, offset);
    items[j].param = param[j].data, items[j].saved = saved[j].data;
    items[j].union_mask = j < 4 ? u.data : NULL, items[j].itemsize = item, items[j].n = n;
  }
  CHECK(wsn_restore_frozen_many(items, 8, 2) == WSN_OK);
  for (j = 0; j < 8; ++j) {
    const int item = 1 << j % 4;
    for (i = 0; i < n; ++i)
      for (k = 0; k < item; ++k)
        wrong += param[j].data[i * item + k] != (j >= 4 || bit_at(u.data, i) ? saved[j].data[i * item + k] : 0xAA);
    free(param[j].base), free(saved[j].base);
  }
  CHECK(wrong == 0);
  free(u.base);
}

/* Rows are taken some at a time: fewer, as many, and some left over. */
static void check_union(int64_t nbytes, int offset) {
  int64_t rows, row, i;
  for (rows = 1; rows <= 9; ++rows) {
    buffer packed = make_bits(8 * rows * nbytes, offset), joined = make(nbytes, offset);
    int wrong = 0;
    CHECK(wsn_union_bits(packed.data, rows, nbytes, joined.data, 2) == WSN_OK);
    for (i = 0; i < nbytes; ++i) {
      uint8_t expected = 0;
      for (row = 0; row < rows; ++row) expected |= packed.data[row * nbytes + i];
      wrong += joined.data[i] != expected;
    }
    CHECK(wrong == 0);
    free(packed.base), free(joined.base);
  }
}

static void check_restore(int64_t n, int offset) {
  int item;
  for (item = 1; item <= 8; item *= 2) {
    buffer param = make(n * item, offset), saved = make_bits(8 * n * item, offset), u = make_bits(n, offset);
    int64_t i;
    int k, wrong = 0;
    CHECK(wsn_restore_frozen(param.data, saved.data, u.data, item, n, 2) == WSN_OK);
    for (i = 0; i < n; ++i)
      for (k = 0; k < item; ++k)
        wrong += param.data[i * item + k] != (bit_at(u.data, i) ? saved.data[i * item + k] : 0xAA);
    CHECK(wrong == 0);
    free(param.base), free(saved.base), free(u.base);
  }
}

/* The arithmetic is PyTorch's and tested against it; here: memory, what must not change, and that the gate of the next
 * forward pass is what wsn_threshold and wsn_gate make of the weight and the scores. */
static void check_steps(int64_t n, int offset) {
  const wsn_adamw adamw = {1e-3, 0.9, 0.999, 1e-8, 1e-2, 3, 1};
  const wsn_sgd sgd = {1e-2, 0.9, 0, 1e-2, 1, 0, 3};
  int dtype;
  for (dtype = WSN_FLOAT32; dtype <= WSN_FLOAT64; ++dtype) {
    const int item = kItem[dtype];
    const int masked_dtype = dtype == WSN_FLOAT32 ? WSN_BFLOAT16 : WSN_FLOAT64;
    const int64_t masked_bytes = n * kItem[masked_dtype];
    buffer g = make_numbers(dtype, n, offset), w = make_numbers(dtype, n, offset), s = make_numbers(dtype, n, offset);
    buffer u = make_bits(n, offset), before = make(n * item, 0), states[4];
    buffer masked = make(masked_bytes, offset), expected = make(masked_bytes, 0);
    uint64_t tau = 0, next_tau = 0, expected_tau = 0;
    int64_t window[WSN_WINDOW] = {0};
    const wsn_next next = {masked.data, &next_tau, window, n / 3, masked_dtype};
    const wsn_gated t = {g.data, NULL, w.data, s.data, &tau, u.data, &next, n, 0.5, dtype, dtype, WSN_MAGNITUDE};
    wsn_adamw_item a = {t, NULL, NULL, NULL, NULL, adamw, adamw, NULL, NULL, NULL, NULL, 0, 0};
    wsn_sgd_item b = {t, NULL, NULL, sgd, sgd, NULL, NULL, 0, 0};
    int64_t i;
    int k;
    for (k = 0; k < 4; ++k) states[k] = make(n * item, offset), memset(states[k].data, 0, (size_t)(n * item));
    a.weight_avg = states[0].data, a.weight_avg_sq = states[1].data;
    a.scores_avg = states[2].data, a.scores_avg_sq = states[3].data;
    b.weight_momentum = states[0].data, b.scores_momentum = states[2].data;
    memcpy(before.data, w.data, (size_t)(n * item));
    for (k = 0; k < 6; ++k) {
      CHECK((k % 2 ? wsn_sgd_step(&b, 1, 2) : wsn_adamw_step(&a, 1, 2)) == WSN_OK);
      if (n == 0) continue;
      CHECK(wsn_threshold(s.data, dtype, n, n / 3, WSN_MAGNITUDE, &expected_tau, 1) == WSN_OK);
      CHECK(memcmp(&next_tau, &expected_tau, (size_t)item) == 0);
      CHECK(wsn_gate(w.data, dtype, s.data, dtype, &next_tau, WSN_MAGNITUDE, expected.data, masked_dtype, NULL, n, 1) ==
            WSN_OK);
      CHECK(memcmp(masked.data, expected.data, (size_t)masked_bytes) == 0);
    }
    CHECK(n == 0 || window[WSN_WINDOW - 2] + window[WSN_WINDOW - 1] == 6);
    for (i = 0; i < n; ++i)
      if (bit_at(u.data, i)) CHECK(memcmp(w.data + i * item, before.data + i * item, (size_t)item) == 0);
    for (k = 0; k < 4; ++k) free(states[k].base);
    free(g.base), free(w.base), free(s.base), free(u.base), free(before.base), free(masked.base), free(expected.base);
  }
}

/* Memory of means that are stored in fewer bytes, and that zeros stay zeros where there is no gradient. */
static void check_stored_means(int64_t n, int offset) {
  const wsn_adamw adamw = {1e-3, 0.9, 0.999, 1e-8, 1e-2, 3, 1};
  const wsn_sgd sgd = {1e-2, 0.9, 0, 1e-2, 1, 0, 3};
  int storage, step, k, wrong = 0;
  for (storage = WSN_MEANS_BFLOAT16; storage <= WSN_MEANS_8BIT; ++storage) {
    const int item = storage == WSN_MEANS_8BIT ? 1 : 2;
    const int64_t scale_bytes = (n + WSN_MEANS_BLOCK - 1) / WSN_MEANS_BLOCK * 4;
    buffer zeros = make(4 * n, offset), w = make_numbers(WSN_FLOAT32, n, offset), states[4], scales[4];
    const wsn_gated t = {zeros.data, zeros.data, w.data, w.data, NULL, NULL, NULL, n, 1, 0, 0, WSN_VALUE};
    wsn_adamw_item a = {t, NULL, NULL, NULL, NULL, adamw, adamw, NULL, NULL, NULL, NULL, storage, storage};
    wsn_sgd_item b = {t, NULL, NULL, sgd, sgd, NULL, NULL, storage, storage};
    buffer s = make_numbers(WSN_FLOAT32, n, offset);
    int64_t i;
    memset(zeros.data, 0, (size_t)(4 * n));
    for (k = 0; k < 4; ++k) {
      states[k] = make(n * item, offset), scales[k] = make(scale_bytes, offset);
      memset(states[k].data, 0, (size_t)(n * item)), memset(scales[k].data, 0, (size_t)scale_bytes);
    }
    a.tensor.scores = b.tensor.scores = s.data;
    a.weight_avg = states[0].data, a.weight_avg_sq = states[1].data;
    a.scores_avg = states[2].data, a.scores_avg_sq = states[3].data;
    a.weight_avg_scales = (float *)(void *)scales[0].data, a.weight_avg_sq_scales = (float *)(void *)scales[1].data;
    a.scores_avg_scales = (float *)(void *)scales[2].data, a.scores_avg_sq_scales = (float *)(void *)scales[3].data;
    b.weight_momentum = states[0].data, b.scores_momentum = states[2].data;
    b.weight_momentum_scales = a.weight_avg_scales, b.scores_momentum_scales = a.scores_avg_scales;
    b.for_weight.weight_decay = b.for_scores.weight_decay = 0;
    for (step = 0; step < 4; ++step)
      CHECK((step % 2 ? wsn_sgd_step(&b, 1, 2) : wsn_adamw_step(&a, 1, 2)) == WSN_OK);
    for (k = 0; k < 4; ++k)
      for (i = 0; i < n * item; ++i) wrong += states[k].data[i] != 0;
    CHECK(wrong == 0);
    for (k = 0; k < 4; ++k) free(states[k].base), free(scales[k].base);
    free(zeros.base), free(w.base), free(s.base);
  }
}

static void check_size(int64_t n, int best) {
  int offset, level;
  for (offset = 0; offset < 4; offset += 3) {
    for (level = 0; level <= best; ++level) {
      CHECK(wsn_limit_instructions(level) == level);
      check_float32(n, WSN_MAGNITUDE, offset);
      check_float32(n, WSN_VALUE, offset);
      check_many(n, offset);
      check_union(n, offset);
      check_steps(n, offset);
      check_stored_means(n, offset);
    }
    check_bits(n, offset);
    check_restore(n, offset);
    check_restore_many(n, offset);
    check_dtypes(n, offset, best);
  }
}

int main(void) {
  const int best = wsn_limit_instructions(-1);
  int64_t n;
  size_t i;
  for (n = 0; n <= 70; ++n) check_size(n, best);
  for (i = 0; i < sizeof kSizes / sizeof kSizes[0]; ++i) check_size(kSizes[i], best);
  check_union(70001, 3); /* more than a part of the result */
  return report();
}
