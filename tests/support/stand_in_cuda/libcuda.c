/* A stand-in for libcuda.so.1. Every call succeeds and nothing runs, but modules, kernels and launches are written down.
 *
 * Over it Triton's own compiler, argument binder and launcher work on CPU tensors, so that a test can count launches,
 * see which kernels are loaded during a capture, and measure the time of the host. */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

typedef int CUresult;

enum { MOST_FUNCTIONS = 4096, MOST_LAUNCHES = 1 << 16, NAME = 128 };
enum { CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_LAUNCH_FAILED = 719, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900 };

struct launch {
  int32_t function; /* index into stand_in_names */
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared;
};

/* Read and written by the tests. */
char stand_in_names[MOST_FUNCTIONS][NAME];
struct launch stand_in_launches[MOST_LAUNCHES];
int64_t stand_in_launch_count = 0;
int64_t stand_in_function_count = 0;
int64_t stand_in_module_count = 0; /* modules loaded */
int32_t stand_in_capturing = 0;    /* a module cannot be loaded while a stream is captured */
int32_t stand_in_broken = 0;       /* launches fail */
int32_t stand_in_major = 9, stand_in_minor = 0, stand_in_processors = 132, stand_in_shared = 232448;

CUresult cuInit(unsigned flags) { (void)flags; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(int *device, int index) { *device = index; return 0; }

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 10: *value = 32; break;                   /* threads of a warp */
    case 16: *value = stand_in_processors; break;
    case 75: *value = stand_in_major; break;
    case 76: *value = stand_in_minor; break;
    default: *value = stand_in_shared; break;      /* every other question is about shared memory */
  }
  return 0;
}

CUresult cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)16; return 0; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
CUresult cuCtxSetCurrent(void *context) { (void)context; return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { (void)limit; (void)value; return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = 0; return 0; }

CUresult cuGetErrorString(CUresult result, const char **text) {
  *text = result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing"
                                                          : "the stand-in was told to fail";
  return 0;
}

CUresult cuModuleLoadData(void **module, const void *image) {
  (void)image;
  if (stand_in_capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  stand_in_module_count++;
  *module = (void *)16;
  return 0;
}

CUresult cuModuleUnload(void *module) { (void)module; return 0; }

/* A function's handle is its index, from 1. */
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module;
  if (stand_in_function_count == MOST_FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(stand_in_names[stand_in_function_count++], name, NAME - 1);
  *function = (void *)(uintptr_t)stand_in_function_count;
  return 0;
}

CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0; /* the most threads of a block; no memory of any kind */
  return 0;
}

CUresult cuFuncSetAttribute(void *function, int attribute, int value) { (void)function; (void)attribute; (void)value; return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { (void)function; (void)config; return 0; }
CUresult cuStreamIsCapturing(void *stream, int *status) { (void)stream; *status = stand_in_capturing; return 0; }
CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { (void)attribute; memcpy(data, &pointer, 8); return 0; }
CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, uint64_t pointer) {
  (void)count; (void)attributes; (void)data; (void)pointer;
  return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { (void)function; (void)config; *count = 1; return 0; }
CUresult cuTensorMapEncodeTiled(void) { return 0; }
CUresult cuTensorMapEncodeIm2col(void) { return 0; }

/* The launch configuration begins with grid x, y, z, block x, y, z and bytes of shared memory. */
CUresult cuLaunchKernelEx(const unsigned *config, void *function, void **parameters, void **extra) {
  (void)parameters; (void)extra;
  if (stand_in_broken) return CUDA_ERROR_LAUNCH_FAILED;
  struct launch *launch = &stand_in_launches[stand_in_launch_count++ % MOST_LAUNCHES];
  launch->function = (int32_t)((uintptr_t)function - 1);
  memcpy(launch->grid, config, sizeof launch->grid);
  launch->threads = config[3] * config[4] * config[5];
  launch->shared = config[6];
  return 0;
}
