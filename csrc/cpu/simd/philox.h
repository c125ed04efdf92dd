// Sixteen calls of the generator of math/philox.h at a time.
#pragma once

#include "cpu/simd/vec.h"
#include "math/philox.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512F__)

struct Product64 {
  __m512i high, low;
};

// a * b in 64 bits, split into high and low words.
BURNISH_INLINE Product64 multiply_words(__m512i a, __m512i b) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  return {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd),
          _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}

// The counters become the words.
BURNISH_INLINE void philox16(__m512i (&c)[4], uint64_t key) {
  const __m512i m0 = _mm512_set1_epi64(0xd2511f53), m1 = _mm512_set1_epi64(0xcd9e8d57);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product64 first = multiply_words(c[0], m0), second = multiply_words(c[2], m1);
    constexpr int kXor3 = 0x96;
    c[0] = _mm512_ternarylogic_epi32(second.high, c[1], _mm512_set1_epi32(static_cast<int32_t>(k0)), kXor3);
    c[1] = second.low;
    c[2] = _mm512_ternarylogic_epi32(first.high, c[3], _mm512_set1_epi32(static_cast<int32_t>(k1)), kXor3);
    c[3] = first.low;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

#endif

}  // namespace burnish::BURNISH_ISA
