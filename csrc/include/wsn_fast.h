/* The C ABI of wsn_fast's native libraries. Plain C: no Python or torch headers, no C++ types, no exceptions.
 *
 * Conventions
 *   - Every function but wsn_abi_version and wsn_error_message returns a wsn_status: WSN_OK, or an error that
 *     wsn_error_message puts in words. On an error nothing has been written.
 *   - Sizes and counts are int64_t. A pointer may be NULL only where its size is 0.
 *   - num_threads >= 1 is an upper bound and comes last: small inputs are done in the calling thread. No thread
 *     outlives the call.
 *   - Buffers belong to the caller. Functions keep no state and may be called from any number of threads at once.
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
#define WSN_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum wsn_status {
  WSN_OK = 0,
  WSN_ERROR_NULL = 1,   /* a pointer is NULL although its size is not 0 */
  WSN_ERROR_SIZE = 2,   /* a size is negative */
  WSN_ERROR_THREADS = 3 /* num_threads is less than 1 */
} wsn_status;

/* The WSN_ABI_VERSION that the library was built with. */
WSN_API int wsn_abi_version(void);

/* An English sentence for a wsn_status, or for any other int one that says so. Static storage, never NULL. */
WSN_API const char *wsn_error_message(int code);

/* Pack n mask bytes into (n + 7) / 8 bytes. Any mask byte other than 0 counts as 1. The buffers must not overlap. */
WSN_API int wsn_pack_bits(const uint8_t *mask, int64_t n, uint8_t *packed, int num_threads);

/* Unpack (n + 7) / 8 bytes into n mask bytes, each 0 or 1. Padding bits are ignored. The buffers must not overlap. */
WSN_API int wsn_unpack_bits(const uint8_t *packed, int64_t n, uint8_t *mask, int num_threads);

/* dst |= src over nbytes bytes. dst and src may be the same buffer, but must not overlap otherwise. */
WSN_API int wsn_or_bits(uint8_t *dst, const uint8_t *src, int64_t nbytes, int num_threads);

/* Write to *out how many of the 8 * nbytes bits are set. out is never NULL, even where nbytes is 0. */
WSN_API int wsn_popcount_bits(const uint8_t *packed, int64_t nbytes, int64_t *out, int num_threads);

#ifdef __cplusplus
}
#endif

#endif /* WSN_FAST_H */
