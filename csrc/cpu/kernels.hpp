// The inner loops, once per instruction set, and the choice between them.
#pragma once

#include <cstdint>

#include "wsn_fast.h"

namespace wsn {

// Where order keys come from. A key is a signed integer that orders as the definition says: for WSN_MAGNITUDE the bits
// of |x|, for WSN_VALUE those bits with the sign of x (so that both zeros are 0). A NaN is above infinity in both.
constexpr int kKeys = 2;  // besides the two rules: the data are keys already

constexpr int64_t kListSlack = 16;

// From so many bytes on, an output passes by the caches: it would leave them before anyone reads it, and an ordinary
// store first reads what it overwrites.
constexpr int64_t kStreamedBytes = int64_t(1) << 25;

struct Source {
  const void *data;
  int width;         // bytes of an element: 2, 4 or 8
  int transform;     // WSN_MAGNITUDE, WSN_VALUE or kKeys
  int64_t infinity;  // the bits of +inf
};

// Keep flags come from scores and tau, or from bits. Outputs that are not wanted are NULL.
struct Gate {
  Source scores;
  int64_t tau;  // its key; the smallest there is for NaN
  const uint8_t *bits;
  const void *weight;
  int weight_dtype;
  uint8_t *mask, *packed;
  void *out;
  int out_dtype;
  bool streams = false;  // whether out passes by the caches
};

struct Backward {
  Source scores;
  int64_t tau;
  int scores_dtype, rule;
  const void *grad, *weight;
  int grad_dtype, weight_dtype;
  const uint8_t *union_mask;
  void *dweight, *dscores;
  bool streams = false;  // whether both pass by the caches
};

// The gradients of an optimizer step: formed from a.grad, or given where there is a score_grad.
struct Gradients {
  Backward a;
  const void *score_grad;
  double scale;
};

// The gate of the next forward pass, while its threshold is not known yet: flags are those of a guess, gate.tau. What
// may turn out otherwise is reported: the elements with keys in [lo, hi], but those at the guess itself only by their
// count.
struct Listed {
  int64_t element, key;
};

struct Speculation {
  Gate gate;
  int64_t lo, hi;
  void (*report)(void *context, const Listed *list, int64_t count);
  void *context;
};

// The optimizers' coefficients, rounded to the dtype where they are used.
struct AdamWStep {
  double lerp, beta2, one_minus_beta2, root_correction, eps, step_size;
  double shrink;  // decoupled weight decay: the factor of the parameter, 1 for none
  double decay;   // coupled weight decay, 0 for none
};

struct SgdStep {
  double lr, momentum, one_minus_dampening, decay;
  bool nesterov, first;
};

// A running mean as it is stored. scales are NULL unless it is stored in 8 bits.
struct Means {
  void *values;
  float *scales;
  int storage;
};

// The means start at element `origin`. Those that are stored in fewer bytes need the number of the update.
template <class Step>
struct Update {
  Means first, second;
  Step step;
  uint32_t count = 0;
  int64_t origin = 0;

  bool is_plain() const { return first.storage == WSN_MEANS_PLAIN; }
};

// Each function does the elements [begin, end); begin is a multiple of kBlock.
struct Kernels {
  // How many keys are <= bound.
  int64_t (*count_upto)(const Source &, int64_t begin, int64_t end, int64_t bound);
  // Writes the keys strictly between lo and hi to list, which has room for end - begin + kListSlack, and returns their
  // number.
  // Adds to counts how many keys are < lo, <= lo and <= hi.
  int64_t (*collect)(const Source &, int64_t begin, int64_t end, int64_t lo, int64_t hi, void *list, int64_t *counts);
  // m keys, one from each of m equal stretches of the n.
  void (*sample)(const Source &, int64_t n, int64_t m, void *keys);
  void (*gate)(const Gate &, int64_t begin, int64_t end);
  void (*backward)(const Backward &, int64_t begin, int64_t end);
  // One step; speculation may be NULL, else counts[0] and counts[1] grow by the keys below lo and at the guess.
  void (*adamw)(const Gradients &, const Update<AdamWStep> &weight, const Update<AdamWStep> &scores,
                const Speculation *speculation, int64_t begin, int64_t end, int64_t *counts);
  void (*sgd)(const Gradients &, const Update<SgdStep> &weight, const Update<SgdStep> &scores,
              const Speculation *speculation, int64_t begin, int64_t end, int64_t *counts);
  // Adds to sums the squares of dW and dS.
  void (*squares)(const Gradients &, int64_t begin, int64_t end, double *sums);
  // The gate again, of those of the list with lo <= key < hi.
  void (*amend)(const Gate &, const Listed *list, int64_t count, int64_t lo, int64_t hi);
  // The bytes [begin, end) of the OR of rows that lie nbytes apart. out overlaps no row.
  void (*unite)(const uint8_t *packed, int64_t rows, int64_t nbytes, int64_t begin, int64_t end, uint8_t *out);
};

extern const Kernels kernels_plain, kernels_avx2, kernels_avx512;

const Kernels &kernels();

// About n^(2/3) samples: then sampling, and what the window holds, cost about the same.
inline int64_t sample_size(int64_t n) {
  int64_t m = 1024;
  while (m < 32768 && double(m) * double(m) * double(m) < double(n) * double(n)) m *= 2;
  return m;
}

// Which of the n elements represents stretch i of m: fixed, but not in step with any period of the data.
inline int64_t sample_position(int64_t i, int64_t n, int64_t m) {
  const int64_t stretch = n / m;
  const uint64_t mixed = (uint64_t(i) + 1) * 0x9e3779b97f4a7c15;
  return i * stretch + int64_t((mixed >> 33) % uint64_t(stretch));
}

inline Source source_of(const void *scores, int dtype, int rule) {
  constexpr int64_t kInfinity[] = {0x7f800000, 0x7ff0000000000000, 0x7f80, 0x7c00};
  return {scores, dtype == WSN_FLOAT32 ? 4 : dtype == WSN_FLOAT64 ? 8 : 2, rule, kInfinity[dtype]};
}

inline int64_t smallest_key(int width) { return -int64_t((uint64_t(1) << (8 * width - 1)) - 1) - 1; }
inline int64_t largest_key(int width) { return int64_t((uint64_t(1) << (8 * width - 1)) - 1); }

// The rank-th key of n.
int64_t select(const Source &source, int64_t n, int64_t rank, int threads);

// Writes the element that a key stands for: +0.0 for either zero, a quiet NaN for any NaN.
void write_element(const Source &source, int64_t key, void *out);

// The key of one tau for comparisons: NaN keeps everything.
int64_t threshold_key(const Source &scores, const void *tau);

}  // namespace wsn
