// Consecutive elements of a register, moved to the places of set bits, zeros elsewhere.
//
// Assembly: the compiler would read the elements by the instruction itself, which is microcode on some processors, and
// reuse one register, whose old contents the instruction waits for.
#pragma once

#include "cpu/simd/vec.h"

#if defined(__AVX512VBMI2__)

namespace burnish::BURNISH_ISA {

BURNISH_INLINE __m512i spread_words(__m512i packed, __mmask32 bits) {
  __m512i spread;
  asm volatile("vpexpandw %1, %0%{%2%}%{z%}" : "=v"(spread) : "v"(packed), "Yk"(bits));
  return spread;
}
BURNISH_INLINE __m512i spread_dwords(__m512i packed, __mmask16 bits) {
  __m512i spread;
  asm volatile("vpexpandd %1, %0%{%2%}%{z%}" : "=v"(spread) : "v"(packed), "Yk"(bits));
  return spread;
}

}  // namespace burnish::BURNISH_ISA

#endif
