/* wsn_fast_cuda.h is usable from C and bad arguments are refused. Exits 0, or names the check that failed. */
#include "wsn_fast_cuda.h"

#include <stdio.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) {                                                \
      printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                      \
    }                                                                  \
  } while (0)

static void check_version_and_messages(void) {
  int code;
  CHECK(wsn_cuda_abi_version() == WSN_CUDA_ABI_VERSION);
  CHECK(strcmp(wsn_cuda_error_message(WSN_CUDA_OK), "no error") == 0);
  CHECK(strcmp(wsn_cuda_error_message(-1), "unknown error") == 0);
  for (code = WSN_CUDA_ERROR_NULL; code <= WSN_CUDA_ERROR_WORKSPACE; ++code)
    CHECK(strcmp(wsn_cuda_error_message(code), wsn_cuda_error_message(-1)) != 0);
  CHECK(strcmp(wsn_cuda_error_message(WSN_CUDA_ERROR_RUNTIME + 9), wsn_cuda_error_message(-1)) != 0);
}

static void check_sizes(void) {
  const int64_t sizes[2] = {1025, 1}, huge[1] = {INT64_MAX}, empty[1] = {0};
  int64_t bytes = -1;
  CHECK(sizeof(wsn_cuda_select_record) == 80);
  CHECK(wsn_cuda_select_state_bytes(3, &bytes) == WSN_CUDA_OK && bytes == 3 * (80 + 2048 * 8));
  CHECK(wsn_cuda_select_state_bytes(0, &bytes) == WSN_CUDA_ERROR_SIZE);
  CHECK(wsn_cuda_select_state_bytes(1, NULL) == WSN_CUDA_ERROR_NULL);
  CHECK(wsn_cuda_select_workspace_bytes(sizes, 2, WSN_CUDA_FLOAT32, 1024, &bytes) == WSN_CUDA_OK);
  CHECK(bytes == 3 * (128 + 1) * 4);
  CHECK(wsn_cuda_select_workspace_bytes(sizes, 2, WSN_CUDA_FLOAT16, 1024, &bytes) == WSN_CUDA_OK && bytes == 0);
  CHECK(wsn_cuda_select_workspace_bytes(huge, 1, WSN_CUDA_FLOAT32, 1024, &bytes) == WSN_CUDA_ERROR_SIZE);
  CHECK(wsn_cuda_select_workspace_bytes(empty, 1, WSN_CUDA_FLOAT32, 1024, &bytes) == WSN_CUDA_ERROR_SIZE);
  CHECK(wsn_cuda_select_workspace_bytes(sizes, 2, 3, 1024, &bytes) == WSN_CUDA_ERROR_DTYPE);
  CHECK(wsn_cuda_select_workspace_bytes(sizes, 2, WSN_CUDA_FLOAT32, 1000, &bytes) == WSN_CUDA_ERROR_CHUNK);
  CHECK(wsn_cuda_select_workspace_bytes(sizes, 2, WSN_CUDA_FLOAT32, 0, &bytes) == WSN_CUDA_ERROR_CHUNK);
  CHECK(wsn_cuda_select_workspace_bytes(NULL, 2, WSN_CUDA_FLOAT32, 1024, &bytes) == WSN_CUDA_ERROR_NULL);
}

static struct {
  wsn_cuda_select_record record;
  int64_t counters[2048];
} state[1];
static int64_t workspace[129], scores[2], tau[1];

/* A call that is right but for what the arguments say. */
static int select_with(const void *address, int64_t size, int64_t rank, int rule, void *memory, void *room,
                       int64_t bytes, void *out) {
  return wsn_cuda_select(&address, &size, &rank, 1, WSN_CUDA_FLOAT32, rule, 0, 1024, memory, room, bytes, out, NULL);
}

static void check_select(void) {
  const int bytes = (int)sizeof workspace;
  char *const byte = (char *)scores;
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, state, workspace, bytes, tau) == WSN_CUDA_OK);
  CHECK(select_with(NULL, 2, 0, WSN_CUDA_VALUE, state, workspace, bytes, tau) == WSN_CUDA_ERROR_NULL);
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, NULL, workspace, bytes, tau) == WSN_CUDA_ERROR_NULL);
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, state, NULL, bytes, tau) == WSN_CUDA_ERROR_NULL);
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, state, workspace, bytes, NULL) == WSN_CUDA_ERROR_NULL);
  CHECK(select_with(scores, 0, 0, WSN_CUDA_VALUE, state, workspace, bytes, tau) == WSN_CUDA_ERROR_SIZE);
  CHECK(select_with(scores, 2, 2, WSN_CUDA_VALUE, state, workspace, bytes, tau) == WSN_CUDA_ERROR_RANK);
  CHECK(select_with(scores, 2, -1, WSN_CUDA_VALUE, state, workspace, bytes, tau) == WSN_CUDA_ERROR_RANK);
  CHECK(select_with(scores, 2, 0, 2, state, workspace, bytes, tau) == WSN_CUDA_ERROR_RULE);
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, state, workspace, 100, tau) == WSN_CUDA_ERROR_WORKSPACE);
  CHECK(select_with(byte + 1, 2, 0, WSN_CUDA_VALUE, state, workspace, bytes, tau) == WSN_CUDA_ERROR_ALIGNMENT);
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, byte + 4, workspace, bytes, tau) == WSN_CUDA_ERROR_ALIGNMENT);
  CHECK(select_with(scores, 2, 0, WSN_CUDA_VALUE, state, workspace, bytes, byte + 2) == WSN_CUDA_ERROR_ALIGNMENT);
}

int main(void) {
  check_version_and_messages();
  check_sizes();
  check_select();
  return failures != 0;
}
