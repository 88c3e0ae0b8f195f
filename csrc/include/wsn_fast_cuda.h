/* The C ABI of the CUDA library wsn_cuda: the exact thresholds of many tensors of scores in one call. Plain C.
 *
 * Conventions
 *   - Functions return a wsn_cuda_status, or WSN_CUDA_ERROR_RUNTIME + e where e is a cudaError_t;
 *     wsn_cuda_error_message puts either in words. On an error of this library itself nothing has been queued.
 *   - Sizes and counts are int64_t. `scores`, `sizes`, `ranks` and `bytes` point to memory of the host, which a call
 *     reads or writes before it returns. The addresses in `scores` and all other pointers are on the current device.
 *     All buffers belong to the caller.
 *   - Nothing is allocated and the host waits for nothing. The work is queued on `stream`, a cudaStream_t of the
 *     current device (NULL: the default stream), and may be captured in a CUDA graph: a call copies nothing to the
 *     device, its description of the tensors travels in the kernels' arguments.
 *   - Functions keep no state and may be called from any number of threads at once.
 */
#ifndef WSN_FAST_CUDA_H
#define WSN_FAST_CUDA_H

#include <stdint.h>

#if defined(_WIN32) && defined(WSN_BUILDING)
#define WSN_CUDA_API __declspec(dllexport)
#elif defined(_WIN32)
#define WSN_CUDA_API __declspec(dllimport)
#else
#define WSN_CUDA_API __attribute__((visibility("default")))
#endif

/* Raised with every incompatible change of this header; a loader refuses a library of another version. */
#define WSN_CUDA_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum wsn_cuda_status {
  WSN_CUDA_OK = 0,
  WSN_CUDA_ERROR_NULL = 1,      /* a pointer is NULL */
  WSN_CUDA_ERROR_SIZE = 2,      /* a count or size is less than 1, or together they are too large */
  WSN_CUDA_ERROR_RANK = 3,      /* a rank is not in [0, size) */
  WSN_CUDA_ERROR_DTYPE = 4,     /* dtype is no wsn_cuda_dtype */
  WSN_CUDA_ERROR_RULE = 5,      /* rule is no wsn_cuda_rule */
  WSN_CUDA_ERROR_CHUNK = 6,     /* chunk is not a multiple of 1024 in [1024, 1048576] */
  WSN_CUDA_ERROR_ALIGNMENT = 7, /* an address is no multiple of its element's size, or of 16 for the buffers */
  WSN_CUDA_ERROR_WORKSPACE = 8, /* workspace_bytes is less than wsn_cuda_select_workspace_bytes says */
  WSN_CUDA_ERROR_RUNTIME = 1000 /* and above: WSN_CUDA_ERROR_RUNTIME + cudaError_t */
} wsn_cuda_status;

typedef enum wsn_cuda_dtype { WSN_CUDA_FLOAT32 = 0, WSN_CUDA_BFLOAT16 = 1, WSN_CUDA_FLOAT16 = 2 } wsn_cuda_dtype;

/* The keys that are ordered: |S| or S. NaN is the largest key, and -0.0 equals +0.0. */
typedef enum wsn_cuda_rule { WSN_CUDA_MAGNITUDE = 0, WSN_CUDA_VALUE = 1 } wsn_cuda_rule;

/* What the library remembers of one tensor from call to call, on the device. The first four are for the user, the
 * others are private. */
typedef struct wsn_cuda_select_record {
  int64_t hits;   /* warm calls whose window held the threshold: the scores were read once */
  int64_t misses; /* warm calls whose window did not: the search started again, over all scores */
  int64_t colds;  /* calls without a window: warm = 0, the first call, or thresholds that move too far to follow */
  int64_t inside; /* keys found inside the windows of the warm calls, together */
  int64_t rank, below;
  uint32_t low, bits, phase, arrived, last, motion, window, known;
} wsn_cuda_select_record;

/* The WSN_CUDA_ABI_VERSION that the library was built with. */
WSN_CUDA_API int wsn_cuda_abi_version(void);

/* Returns an English sentence for each returned code, and "unknown error" for any other int. Static storage, never
 * NULL. */
WSN_CUDA_API const char *wsn_cuda_error_message(int code);

/* *bytes = size of the state of `count` tensors: that many wsn_cuda_select_record, and 16 KiB of counters for each. */
WSN_CUDA_API int wsn_cuda_select_state_bytes(int64_t count, int64_t *bytes);

/* *bytes = size of the workspace of a call: about half a byte per score of float32, and 0 for the 16-bit formats. */
WSN_CUDA_API int wsn_cuda_select_workspace_bytes(const int64_t *sizes, int64_t count, int dtype, int64_t chunk,
                                                 int64_t *bytes);

/* Write to tau[i] the key of rank ranks[i] (0: the smallest) among the sizes[i] scores at scores[i], for every
 * i < count, as an element of the scores' format; zero is written as +0.0 and NaN as some NaN.
 *
 *   scores     host array of addresses, each a multiple of the element's size only.
 *   warm       not 0: count inside a window around the threshold that `state` remembers first. The result is exact
 *              either way. A warm call needs one more launch, and reads the scores once if the window holds the
 *              threshold. A cold call reads them twice.
 *   chunk      scores per block, a multiple of 1024 in [1024, 1048576]. If no tensor has more, one launch does it all.
 *   state      wsn_cuda_select_state_bytes(count) bytes, 16-byte aligned, zero before their first use. For one call at
 *              a time; a later call with the same `count` may use it again, also for other tensors.
 *   workspace  workspace_bytes bytes with any contents, 16-byte aligned, for one call at a time; may be NULL if 0.
 *   tau        [count] of the scores' format, aligned as an element.
 */
WSN_CUDA_API int wsn_cuda_select(const void *const *scores, const int64_t *sizes, const int64_t *ranks, int64_t count,
                                 int dtype, int rule, int warm, int64_t chunk, void *state, void *workspace,
                                 int64_t workspace_bytes, void *tau, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* WSN_FAST_CUDA_H */
