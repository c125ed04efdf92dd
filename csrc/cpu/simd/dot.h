// Dot products along k: a vector of consecutive elements of both operands a step, the lanes added up at the end.
#pragma once

#include "cpu/simd/element.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512BF16__)
struct DotPairs {
  using Stored = bf16;
  using Part = __m512i;
  static constexpr int64_t kDepth = 32;
  static BURNISH_INLINE Part load_part(const bf16* p) { return _mm512_loadu_si512(p); }
  static BURNISH_INLINE Part load_part(const bf16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p);
  }
  static BURNISH_INLINE void multiply_add(Vec& sum, Part w, Part x) { Pairs::multiply_add(sum, w, x); }
};
#endif

template <class T>
struct DotFloats {
  using Stored = T;
  using Part = Vec;
  static constexpr int64_t kDepth = Vec::kLanes;
  static BURNISH_INLINE Part load_part(const T* p) { return load(p, kDepth); }
  static BURNISH_INLINE Part load_part(const T* p, int64_t count) { return load(p, count); }
  static BURNISH_INLINE void multiply_add(Vec& sum, Part w, Part x) { sum = fma(w, x, sum); }
};

}  // namespace burnish::BURNISH_ISA
