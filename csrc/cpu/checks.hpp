// What every entry of the ABI asks of its arguments.
#pragma once

#include <cstdint>

#include "wsn_fast.h"

namespace wsn {

template <class... Pointers>
int check(int64_t n, int num_threads, Pointers... pointers) {
  if (n < 0) return WSN_ERROR_SIZE;
  if (num_threads < 1) return WSN_ERROR_THREADS;
  return n > 0 && (... || (pointers == nullptr)) ? WSN_ERROR_NULL : WSN_OK;
}

inline bool is_dtype(int64_t dtype) { return dtype >= WSN_FLOAT32 && dtype <= WSN_FLOAT16; }
inline bool is_rule(int64_t rule) { return rule == WSN_MAGNITUDE || rule == WSN_VALUE; }
inline int item_size(int dtype) { return dtype == WSN_FLOAT32 ? 4 : dtype == WSN_FLOAT64 ? 8 : 2; }

}  // namespace wsn
