// The host side of the selection: checks, and launches that describe up to kGroup tensors each in their arguments.
#include "wsn_fast_cuda.h"

#include <cuda_runtime.h>

#include "select_kernel.cuh"

namespace {

int blocks_of(int64_t size, int64_t chunk, int64_t *blocks) {
  if (size < 1) return WSN_CUDA_ERROR_SIZE;
  *blocks += (size - 1) / chunk + 1;
  return *blocks > INT32_MAX ? WSN_CUDA_ERROR_SIZE : WSN_CUDA_OK;
}

int64_t element_size(int dtype) { return dtype == WSN_CUDA_FLOAT32 ? 4 : 2; }

bool misaligned(const void *pointer, int64_t size) { return reinterpret_cast<uintptr_t>(pointer) % size != 0; }

template <class F, bool kMagnitude>
int launch_all(const Group &group, bool warm, bool one_launch, cudaStream_t stream) {
  const int launches = one_launch ? 1 : Key<F, kMagnitude>::kDigits + warm;
  for (int i = 0; i < launches; ++i) {
    Group copy = group;
    Launch launch = i > 0 ? kNext : warm ? kWarm : kCold;
    void *arguments[] = {&copy, &launch};
    const dim3 grid(static_cast<unsigned>(group.first_block[group.count]));
    const cudaError_t error =
        cudaLaunchKernel(select_kernel<F, kMagnitude>, grid, dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return WSN_CUDA_ERROR_RUNTIME + static_cast<int>(error);
  }
  return WSN_CUDA_OK;
}

int launch_all(const Group &group, int dtype, int rule, bool warm, bool one_launch, cudaStream_t stream) {
  const bool magnitude = rule == WSN_CUDA_MAGNITUDE;
  switch (dtype) {
    case WSN_CUDA_FLOAT32:
      return (magnitude ? launch_all<Float32, true> : launch_all<Float32, false>)(group, warm, one_launch, stream);
    case WSN_CUDA_BFLOAT16:
      return (magnitude ? launch_all<BFloat16, true> : launch_all<BFloat16, false>)(group, warm, one_launch, stream);
    default:
      return (magnitude ? launch_all<Float16, true> : launch_all<Float16, false>)(group, warm, one_launch, stream);
  }
}

int check_tensors(const void *const *scores, const int64_t *sizes, const int64_t *ranks, int64_t count, int dtype) {
  for (int64_t i = 0; i < count; ++i) {
    if (scores[i] == nullptr) return WSN_CUDA_ERROR_NULL;
    if (sizes[i] < 1) return WSN_CUDA_ERROR_SIZE;
    if (ranks[i] < 0 || ranks[i] >= sizes[i]) return WSN_CUDA_ERROR_RANK;
    if (misaligned(scores[i], element_size(dtype))) return WSN_CUDA_ERROR_ALIGNMENT;
  }
  return WSN_CUDA_OK;
}

}  // namespace

extern "C" {

int wsn_cuda_abi_version(void) { return WSN_CUDA_ABI_VERSION; }

const char *wsn_cuda_error_message(int code) {
  switch (code) {
    case WSN_CUDA_OK: return "no error";
    case WSN_CUDA_ERROR_NULL: return "a pointer is NULL";
    case WSN_CUDA_ERROR_SIZE: return "a count or size is less than 1, or together they are too large";
    case WSN_CUDA_ERROR_RANK: return "a rank is out of range";
    case WSN_CUDA_ERROR_DTYPE: return "unknown dtype";
    case WSN_CUDA_ERROR_RULE: return "unknown rule";
    case WSN_CUDA_ERROR_CHUNK: return "chunk is not a multiple of 1024 in [1024, 1048576]";
    case WSN_CUDA_ERROR_ALIGNMENT: return "an address is not aligned";
    case WSN_CUDA_ERROR_WORKSPACE: return "the workspace is too small";
    default: break;
  }
  if (code > WSN_CUDA_ERROR_RUNTIME) return cudaGetErrorString(static_cast<cudaError_t>(code - WSN_CUDA_ERROR_RUNTIME));
  return "unknown error";
}

int wsn_cuda_select_state_bytes(int64_t count, int64_t *bytes) {
  if (bytes == nullptr) return WSN_CUDA_ERROR_NULL;
  if (count < 1 || count > INT32_MAX) return WSN_CUDA_ERROR_SIZE;
  *bytes = count * static_cast<int64_t>(sizeof(Record) + kBins * sizeof(Count));
  return WSN_CUDA_OK;
}

int wsn_cuda_select_workspace_bytes(const int64_t *sizes, int64_t count, int dtype, int64_t chunk, int64_t *bytes) {
  if (sizes == nullptr || bytes == nullptr) return WSN_CUDA_ERROR_NULL;
  if (count < 1 || count > INT32_MAX) return WSN_CUDA_ERROR_SIZE;
  if (dtype < WSN_CUDA_FLOAT32 || dtype > WSN_CUDA_FLOAT16) return WSN_CUDA_ERROR_DTYPE;
  if (chunk < 1024 || chunk > 1048576 || chunk % 1024 != 0) return WSN_CUDA_ERROR_CHUNK;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int error = blocks_of(sizes[i], chunk, &blocks);
    if (error != WSN_CUDA_OK) return error;
  }
  *bytes = dtype == WSN_CUDA_FLOAT32 ? blocks * (chunk / kListShare + 1) * static_cast<int64_t>(sizeof(uint32_t)) : 0;
  return WSN_CUDA_OK;
}

int wsn_cuda_select(const void *const *scores, const int64_t *sizes, const int64_t *ranks, int64_t count, int dtype,
                    int rule, int warm, int64_t chunk, void *state, void *workspace, int64_t workspace_bytes, void *tau,
                    void *stream) {
  int64_t needed;
  int error = wsn_cuda_select_workspace_bytes(sizes, count, dtype, chunk, &needed);
  if (error != WSN_CUDA_OK) return error;
  if (rule != WSN_CUDA_MAGNITUDE && rule != WSN_CUDA_VALUE) return WSN_CUDA_ERROR_RULE;
  if (scores == nullptr || ranks == nullptr || state == nullptr || tau == nullptr) return WSN_CUDA_ERROR_NULL;
  if (needed > 0 && workspace == nullptr) return WSN_CUDA_ERROR_NULL;
  if (workspace_bytes < needed) return WSN_CUDA_ERROR_WORKSPACE;
  if (misaligned(state, 16) || misaligned(workspace, 16) || misaligned(tau, element_size(dtype)))
    return WSN_CUDA_ERROR_ALIGNMENT;
  error = check_tensors(scores, sizes, ranks, count, dtype);
  if (error != WSN_CUDA_OK) return error;

  Group group = {};
  group.chunk = static_cast<int32_t>(chunk);
  group.lists = static_cast<uint32_t *>(workspace);  // groups follow one another, so they share the lists
  for (int64_t first = 0; first < count; first += kGroup) {
    group.count = static_cast<int32_t>(count - first < kGroup ? count - first : kGroup);
    group.records = static_cast<Record *>(state) + first;
    group.counts = reinterpret_cast<Count *>(static_cast<Record *>(state) + count) + first * kBins;
    group.tau = static_cast<char *>(tau) + first * element_size(dtype);
    int64_t blocks = 0;
    bool one_launch = true;
    for (int i = 0; i < group.count; ++i) {
      group.scores[i] = scores[first + i];
      group.size[i] = sizes[first + i];
      group.rank[i] = ranks[first + i];
      group.first_block[i] = static_cast<int32_t>(blocks);
      blocks_of(sizes[first + i], chunk, &blocks);
      one_launch = one_launch && sizes[first + i] <= chunk;
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    group.listed = group.lists + blocks * (chunk / kListShare);
    error = launch_all(group, dtype, rule, warm != 0, one_launch, static_cast<cudaStream_t>(stream));
    if (error != WSN_CUDA_OK) return error;
  }
  return WSN_CUDA_OK;
}

}  // extern "C"
