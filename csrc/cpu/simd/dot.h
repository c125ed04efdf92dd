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

// The sums of the lanes of four vectors, in order.
BURNISH_INLINE void add_lanes(const Vec (&sum)[4], float* out) {
#if defined(__AVX512F__)
  const auto half = [](__m512 a) __attribute__((always_inline)) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  };
  const __m256 first = _mm256_hadd_ps(half(sum[0].v), half(sum[1].v));
  const __m256 second = _mm256_hadd_ps(half(sum[2].v), half(sum[3].v));
#elif defined(__AVX2__)
  const __m256 first = _mm256_hadd_ps(sum[0].v, sum[1].v), second = _mm256_hadd_ps(sum[2].v, sum[3].v);
#endif
#if defined(__AVX2__)
  const __m256 both = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum[i].v;
#endif
}

}  // namespace burnish::BURNISH_ISA
