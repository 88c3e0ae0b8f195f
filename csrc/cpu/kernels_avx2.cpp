// The kernels for AVX2 with FMA, by this file's compiler flags.
#ifdef WSN_X86_KERNELS
#define WSN_KERNELS kernels_avx2
#include "kernels.inl"
#endif
