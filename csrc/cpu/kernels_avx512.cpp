// The kernels for AVX-512 (F, BW, DQ, VL), by this file's compiler flags.
#ifdef WSN_X86_KERNELS
#define WSN_KERNELS kernels_avx512
#include "kernels.inl"
#endif
