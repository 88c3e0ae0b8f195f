// Which instruction set runs the kernels.
#include <atomic>

#include "kernels.hpp"

namespace {

[[maybe_unused]] constexpr int kPlain = 0, kAvx2 = 1, kAvx512 = 2;

int best_level() {
#if defined(WSN_X86_KERNELS)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPlain;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? kAvx512 : kAvx2;
#else
  return kPlain;
#endif
}

std::atomic<int> limit{kAvx512};

int level() {
  static const int best = best_level();
  const int most = limit.load(std::memory_order_relaxed);
  return best < most ? best : most;
}

}  // namespace

int wsn_limit_instructions(int most) {
  if (most >= 0) limit.store(most, std::memory_order_relaxed);
  return level();
}

const wsn::Kernels &wsn::kernels() {
#if defined(WSN_X86_KERNELS)
  if (level() == kAvx512) return kernels_avx512;
  if (level() == kAvx2) return kernels_avx2;
#endif
  return kernels_plain;
}
