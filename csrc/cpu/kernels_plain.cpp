// The kernels for the instruction set that the compiler targets by default.
#define WSN_KERNELS kernels_plain
#include "kernels.inl"
