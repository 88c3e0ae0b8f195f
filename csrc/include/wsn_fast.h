/* The C ABI of wsn_fast's native CPU library. Plain C: no Python or torch headers, no C++ types, no exceptions.
 *
 * Conventions
 *   - Every function that returns a wsn_status returns WSN_OK, or an error that wsn_error_message puts in words. On an
 *     error nothing has been written.
 *   - Sizes and counts are int64_t. A pointer may be NULL where its size is 0, and where its comment says so. Element
 *     pointers need no alignment. An output must not overlap any other argument, except where a comment says that it
 *     may be the same buffer as an input.
 *   - num_threads >= 1 is an upper bound and comes last: small inputs are done in the calling thread. Every result is
 *     the same, to the bit, for every number of threads.
 *   - Functions may be called from any number of threads at once, and in a child of fork(). The library keeps
 *     a pool of sleeping threads, which the first call that needs them starts: do not unload the library.
 *   - Buffers belong to the caller.
 *
 * The gate: keep(i) = not (key[i] < tau)
 *   The key is |S| for WSN_MAGNITUDE and S for WSN_VALUE. -0.0 equals +0.0, denormals are compared as they are whatever
 *   the processor's rounding mode, NaN is the largest key and is kept, and a NaN tau keeps everything. What is not kept
 *   becomes +0.0, by a select. A tau is one element in the dtype of the scores.
 *   Conversions round to nearest even, as PyTorch's do: from float64 to a 16-bit type by way of float32.
 *
 * Packed masks
 *   Element i of the row-major flattened tensor is bit i % 8, least significant first, of byte i / 8. n elements
 *   take (n + 7) / 8 bytes, and the padding bits of the last byte are zero.
 */
#ifndef WSN_FAST_H
#define WSN_FAST_H

#include <stdint.h>

#if defined(_WIN32) && defined(WSN_BUILDING)
#define WSN_API __declspec(dllexport)
#elif defined(_WIN32)
#define WSN_API __declspec(dllimport)
#else
#define WSN_API __attribute__((visibility("default")))
#endif

/* Raised with every incompatible change of this header; a loader refuses a library of another version. */
#define WSN_ABI_VERSION 6

#ifdef __cplusplus
extern "C" {
#endif

typedef enum wsn_status {
  WSN_OK = 0,
  WSN_ERROR_NULL = 1,    /* a pointer is NULL although its size is not 0 */
  WSN_ERROR_SIZE = 2,    /* a size is negative, or zero where there must be an element */
  WSN_ERROR_THREADS = 3, /* num_threads is less than 1 */
  WSN_ERROR_DTYPE = 4,   /* not a wsn_dtype, or one that the function does not have */
  WSN_ERROR_RULE = 5,    /* not a wsn_rule */
  WSN_ERROR_RANK = 6,    /* a rank is not in [0, n) */
  WSN_ERROR_MEMORY = 7,  /* no memory for the workspace */
  WSN_ERROR_STORAGE = 8  /* not a wsn_means */
} wsn_status;

typedef enum wsn_dtype { WSN_FLOAT32 = 0, WSN_FLOAT64 = 1, WSN_BFLOAT16 = 2, WSN_FLOAT16 = 3 } wsn_dtype;

typedef enum wsn_rule { WSN_MAGNITUDE = 0, WSN_VALUE = 1 } wsn_rule;

/* The WSN_ABI_VERSION that the library was built with. */
WSN_API int wsn_abi_version(void);

/* Returns an English sentence for each wsn_status, and "unknown error code" for any other int. Static storage, never
 * NULL. */
WSN_API const char *wsn_error_message(int code);

/* Use instruction sets up to this one (0 plain, 1 AVX2 with FMA, 2 AVX-512) where the machine and the build have it.
 * A negative level changes nothing. Returns the level in use, which is the best one by default. For tests and
 * comparisons. */
WSN_API int wsn_limit_instructions(int level);

/* --- the gate ---------------------------------------------------------------------------------------------------- */

/* Write to *tau the rank-th (from 0) of the n >= 1 ascending keys of the scores, NaN last: an element in their dtype,
 * +0.0 for either zero, and a quiet NaN for any NaN. */
WSN_API int wsn_threshold(const void *scores, int dtype, int64_t n, int64_t rank, int rule, void *tau, int num_threads);

/* mask[i] (a byte, 0 or 1) and its packed form, from scores and tau. Either output may be NULL. */
WSN_API int wsn_keep(const void *scores, int dtype, const void *tau, int rule, uint8_t *mask, uint8_t *packed,
                     int64_t n, int num_threads);

/* out = keep ? weight : +0.0 in out_dtype; packed, which may be NULL, receives the mask. */
WSN_API int wsn_gate(const void *weight, int weight_dtype, const void *scores, int scores_dtype, const void *tau,
                     int rule, void *out, int out_dtype, uint8_t *packed, int64_t n, int num_threads);

/* out[i] = bit i of packed ? weight[i] : +0.0 in out_dtype. */
WSN_API int wsn_gate_packed(const void *weight, int weight_dtype, const uint8_t *packed, void *out, int out_dtype,
                            int64_t n, int num_threads);

/* From grad, the gradient of the masked weight, rounded first to the dtype of the weight:
 *   dweight (dtype of the weight) = keep and not union ? grad : +0.0, and
 *   dscores (dtype of the scores) = grad * weight rounded to the dtype of the weight, times sign(scores) for
 *   WSN_MAGNITUDE (sign of a zero or a NaN: 0), as a product.
 * union_mask is packed; NULL means that no bit is set. A gradient that is not wanted is NULL; tau may be NULL without
 * dweight. */
WSN_API int wsn_gate_backward(const void *grad, int grad_dtype, const void *weight, int weight_dtype,
                              const void *scores, int scores_dtype, const void *tau, int rule,
                              const uint8_t *union_mask, void *dweight, void *dscores, int64_t n, int num_threads);

/* wsn_threshold and wsn_gate for one of many tensors. Like those of wsn_backward_item, all members have 64 bits, so that
 * a caller can fill a table of them as an array of integers. */
typedef struct wsn_gate_item {
  const void *weight, *scores;
  void *tau;    /* receives the threshold */
  void *masked; /* receives keep ? weight : +0.0, in masked_dtype */
  int64_t n;    /* at least 1 */
  int64_t rank;
  int64_t weight_dtype, scores_dtype, masked_dtype, rule;
} wsn_gate_item;

WSN_API int wsn_gates(const wsn_gate_item *items, int64_t count, int num_threads);

/* wsn_gate_backward for one of many tensors; the same members may be NULL. */
typedef struct wsn_backward_item {
  const void *grad, *weight, *scores, *tau;
  const uint8_t *union_mask;
  void *dweight, *dscores;
  int64_t n;
  int64_t grad_dtype, weight_dtype, scores_dtype, rule;
} wsn_backward_item;

WSN_API int wsn_gates_backward(const wsn_backward_item *items, int64_t count, int num_threads);

/* param = bit of union_mask ? saved : param, bit for bit, over n elements of itemsize 1, 2, 4 or 8 bytes. */
WSN_API int wsn_restore_frozen(void *param, const void *saved, const uint8_t *union_mask, int itemsize, int64_t n,
                               int num_threads);

/* wsn_restore_frozen for one of many tensors. A NULL union_mask means that every bit is set. */
typedef struct wsn_restore_item {
  void *param;
  const void *saved;
  const uint8_t *union_mask;
  int64_t itemsize, n;
} wsn_restore_item;

WSN_API int wsn_restore_frozen_many(const wsn_restore_item *items, int64_t count, int num_threads);

/* --- optimizer steps ---------------------------------------------------------------------------------------------- */

/* What a step prepares for the next forward pass, from the weight and the scores as it leaves them. */
typedef struct wsn_next {
  void *masked;    /* n elements of masked_dtype: keep ? weight : +0.0, as wsn_gate writes them */
  void *tau;       /* receives the threshold, as wsn_threshold writes it; may be the tau that the step reads */
  int64_t *window; /* [WSN_WINDOW]: set it to 0 before the first step with these scores, and pass it unchanged to the
                      later ones. A step is faster if the threshold has moved little. The result is exact whatever this
                      holds. window[6] counts the steps that found the threshold in the window, window[7] those that
                      searched all scores. */
  int64_t rank;    /* of the threshold, as for wsn_threshold */
  int32_t masked_dtype;
} wsn_next;

enum { WSN_WINDOW = 8 };

/* A tensor and its gradients. weight, scores and score_grad are float32 or float64, all of one dtype and n elements. */
typedef struct wsn_gated {
  const void *grad;          /* of the masked weight, as for wsn_gate_backward; of the weight if score_grad is given */
  const void *score_grad;    /* of the scores, or NULL: both gradients are formed from grad, in the same pass */
  void *weight;
  void *scores;
  const void *tau;           /* of the forward pass; may be NULL with score_grad */
  const uint8_t *union_mask; /* may be NULL; a weight with its bit set is not changed, in any bit */
  const wsn_next *next;      /* may be NULL */
  int64_t n;
  double scale;              /* a factor for both gradients, rounded to dtype */
  int32_t dtype;
  int32_t grad_dtype;        /* any; grad is converted to dtype first. dtype itself with score_grad */
  int32_t rule;
} wsn_gated;

/* torch.optim.Adam (decoupled = 0: weight decay is added to the gradient) and AdamW (decoupled = 1). */
typedef struct wsn_adamw {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step; /* that of this update: 1 at first */
  int32_t decoupled;
} wsn_adamw;

/* torch.optim.SGD. first = 1: the momentum buffer is set to the gradient, as at an optimizer's first step. */
typedef struct wsn_sgd {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov;
  int32_t first;
  int64_t step; /* that of this update, 1 at first; only read if the momentum buffer is stored in fewer bytes */
} wsn_sgd;

/* How running means and momentum buffers are stored: in the dtype of the tensor; and, of a float32 tensor, as bfloat16
 * (uint16_t), or in 8 bits (uint8_t) with (n + WSN_MEANS_BLOCK - 1) / WSN_MEANS_BLOCK scales.
 * wsn_fast/backends/moments.py specifies the two last ones. */
typedef enum wsn_means { WSN_MEANS_PLAIN = 0, WSN_MEANS_BFLOAT16 = 1, WSN_MEANS_8BIT = 2 } wsn_means;

enum { WSN_MEANS_BLOCK = 256 };

/* A tensor, its running means, and the settings for its weight and its scores. For a frozen weight the step
 * uses a gradient of 0: its means decay and the weight stays. A plain mean, or momentum buffer, that becomes denormal is
 * set to 0. Scales are NULL unless the means are stored in 8 bits. */
typedef struct wsn_adamw_item {
  wsn_gated tensor;
  void *weight_avg, *weight_avg_sq, *scores_avg, *scores_avg_sq;
  wsn_adamw for_weight, for_scores;
  float *weight_avg_scales, *weight_avg_sq_scales, *scores_avg_scales, *scores_avg_sq_scales;
  int32_t weight_storage, scores_storage; /* of both means of each */
} wsn_adamw_item;

/* A momentum buffer may be NULL where its momentum is 0. */
typedef struct wsn_sgd_item {
  wsn_gated tensor;
  void *weight_momentum, *scores_momentum;
  wsn_sgd for_weight, for_scores;
  float *weight_momentum_scales, *scores_momentum_scales;
  int32_t weight_storage, scores_storage;
} wsn_sgd_item;

/* One step on the weights and the scores of `count` tensors, which share no memory. */
WSN_API int wsn_adamw_step(const wsn_adamw_item *items, int64_t count, int num_threads);
WSN_API int wsn_sgd_step(const wsn_sgd_item *items, int64_t count, int num_threads);

/* Write to out[2 i] and out[2 i + 1] the sums of the squares of the gradients that a step would form for the weight and
 * the scores of tensor i, added up in float64. next is not read. */
WSN_API int wsn_gradient_squares(const wsn_gated *tensors, int64_t count, double *out, int num_threads);

/* --- packed masks ------------------------------------------------------------------------------------------------- */

/* Pack n mask bytes into (n + 7) / 8 bytes. Any mask byte other than 0 counts as 1. */
WSN_API int wsn_pack_bits(const uint8_t *mask, int64_t n, uint8_t *packed, int num_threads);

/* Unpack (n + 7) / 8 bytes into n mask bytes, each 0 or 1. Padding bits are ignored. */
WSN_API int wsn_unpack_bits(const uint8_t *packed, int64_t n, uint8_t *mask, int num_threads);

/* dst |= src over nbytes bytes. dst and src may be the same buffer. */
WSN_API int wsn_or_bits(uint8_t *dst, const uint8_t *src, int64_t nbytes, int num_threads);

/* out[i] = the OR of packed[r * nbytes + i] over 0 <= r < rows, for 0 <= i < nbytes; rows >= 1. */
WSN_API int wsn_union_bits(const uint8_t *packed, int64_t rows, int64_t nbytes, uint8_t *out, int num_threads);

/* Write to *out how many of the 8 * nbytes bits are set. out is never NULL, even where nbytes is 0. */
WSN_API int wsn_popcount_bits(const uint8_t *packed, int64_t nbytes, int64_t *out, int num_threads);

#ifdef __cplusplus
}
#endif

#endif /* WSN_FAST_H */
