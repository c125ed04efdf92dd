// Sixteen calls of the generator of math/philox.h at a time.
#pragma once

#include "cpu/simd/vec.h"
#include "math/philox.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512F__)

// One call in the low word of each of eight lanes, the high words are spare: the multiplication ignores them, so that a
// round is six instructions.
BURNISH_INLINE void philox8(__m512i (&c)[4], uint64_t key) {
  const __m512i m0 = _mm512_set1_epi64(0xd2511f53), m1 = _mm512_set1_epi64(0xcd9e8d57);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  BURNISH_UNROLL for (int round = 0; round < 10; ++round) {
    const __m512i first = _mm512_mul_epu32(c[0], m0), second = _mm512_mul_epu32(c[2], m1);
    constexpr int kXor3 = 0x96;
    c[0] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(second, 32), c[1], _mm512_set1_epi32(static_cast<int32_t>(k0)),
                                     kXor3);
    c[1] = second;
    c[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(first, 32), c[3], _mm512_set1_epi32(static_cast<int32_t>(k1)),
                                     kXor3);
    c[3] = first;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// The counters become the words.
BURNISH_INLINE void philox16(__m512i (&c)[4], uint64_t key) {
  __m512i even[4], odd[4];
  for (int i = 0; i < 4; ++i) {
    even[i] = c[i];
    odd[i] = _mm512_srli_epi64(c[i], 32);
  }
  philox8(even, key);
  philox8(odd, key);
  for (int i = 0; i < 4; ++i) c[i] = _mm512_mask_blend_epi32(0xaaaa, even[i], _mm512_slli_epi64(odd[i], 32));
}

#endif

}  // namespace burnish::BURNISH_ISA
