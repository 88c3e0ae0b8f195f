/* The header is usable from C and the library keeps its contracts. Exits 0, or names the check that failed. */
#include "wsn_fast.h"

#include <stdio.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                     \
    }                                                                 \
  } while (0)

static void check_version_and_messages(void) {
  CHECK(wsn_abi_version() == WSN_ABI_VERSION);
  CHECK(strcmp(wsn_error_message(WSN_OK), "no error") == 0);
  CHECK(strcmp(wsn_error_message(WSN_ERROR_NULL), wsn_error_message(WSN_ERROR_SIZE)) != 0);
  CHECK(strcmp(wsn_error_message(WSN_ERROR_THREADS), wsn_error_message(-1)) != 0);
  CHECK(strcmp(wsn_error_message(12345), wsn_error_message(-1)) == 0);
}

static void check_layout(void) {
  const uint8_t mask[11] = {1, 0, 0, 1, 0, 0, 0, 255, 0, 2, 1};
  const uint8_t other[2] = {0x02, 0x01};
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
}

static void check_errors(void) {
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
  CHECK(wsn_popcount_bits(NULL, 1, &count, 1) == WSN_ERROR_NULL);
  CHECK(wsn_popcount_bits(a, 1, NULL, 1) == WSN_ERROR_NULL);
  CHECK(wsn_popcount_bits(a, -1, &count, 1) == WSN_ERROR_SIZE);
  CHECK(count == 7);
}

static void check_empty(void) {
  int64_t count = -1;
  CHECK(wsn_pack_bits(NULL, 0, NULL, 1) == WSN_OK);
  CHECK(wsn_unpack_bits(NULL, 0, NULL, 1) == WSN_OK);
  CHECK(wsn_or_bits(NULL, NULL, 0, 1) == WSN_OK);
  CHECK(wsn_popcount_bits(NULL, 0, &count, 1) == WSN_OK && count == 0);
}

int main(void) {
  check_version_and_messages();
  check_layout();
  check_errors();
  check_empty();
  return failures != 0;
}
