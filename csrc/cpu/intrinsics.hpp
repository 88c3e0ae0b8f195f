// The vector instructions of x86-64, where this file's instruction set has them.
#pragma once

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the operand that an instruction ignores for a variable that was forgotten (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif
