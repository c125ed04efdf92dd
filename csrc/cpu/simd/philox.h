// The generator of math/philox.h on all lanes at a time.
#pragma once

#include "cpu/simd/vec.h"
#include "math/philox.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512F__)

using Ints = __m512i;
BURNISH_INLINE Ints spread(uint32_t a) { return _mm512_set1_epi32(static_cast<int32_t>(a)); }
BURNISH_INLINE Ints even_products(Ints a, uint32_t b) { return _mm512_mul_epu32(a, _mm512_set1_epi64(b)); }
BURNISH_INLINE Ints to_even(Ints a) { return _mm512_srli_epi64(a, 32); }
BURNISH_INLINE Ints woven(Ints even, Ints odd) {
  constexpr __mmask16 kOdd = 0xaaaa;
  const __m512 low = _mm512_castsi512_ps(even), high = _mm512_castsi512_ps(odd);
  return _mm512_castps_si512(_mm512_mask_moveldup_ps(low, kOdd, high));
}
BURNISH_INLINE Ints xor3(Ints a, Ints b, Ints c) {
  constexpr int kXor3 = 0x96;
  return _mm512_ternarylogic_epi32(a, b, c, kXor3);
}

#elif defined(__AVX2__)

using Ints = __m256i;
BURNISH_INLINE Ints spread(uint32_t a) { return _mm256_set1_epi32(static_cast<int32_t>(a)); }
BURNISH_INLINE Ints even_products(Ints a, uint32_t b) { return _mm256_mul_epu32(a, _mm256_set1_epi64x(b)); }
BURNISH_INLINE Ints to_even(Ints a) { return _mm256_srli_epi64(a, 32); }
BURNISH_INLINE Ints woven(Ints even, Ints odd) {
  constexpr int kOdd = 0xaa;
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), kOdd);
}
BURNISH_INLINE Ints xor3(Ints a, Ints b, Ints c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

#endif

#if defined(__AVX2__)

// Calls in the even lanes of rows of counters; the odd lanes are spare: the multiplication ignores them. A round waits
// for its multiplications, so rows go side by side.
template <int kRounds, int kRows>
BURNISH_INLINE void philox_even(Ints (&c)[kRows][4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  BURNISH_UNROLL for (int round = 0; round < kRounds; ++round) {
    BURNISH_UNROLL for (int r = 0; r < kRows; ++r) {
      const Ints first = even_products(c[r][0], 0xd2511f53u), second = even_products(c[r][2], 0xcd9e8d57u);
      c[r][0] = xor3(to_even(second), c[r][1], spread(k0));
      c[r][1] = second;
      c[r][2] = xor3(to_even(first), c[r][3], spread(k1));
      c[r][3] = first;
    }
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// One call in every lane of each row: the counters become the words.
template <int kRounds, int kRows>
BURNISH_INLINE void philox_lanes(Ints (&c)[kRows][4], uint64_t key) {
  Ints halves[2 * kRows][4];
  BURNISH_UNROLL for (int i = 0; i < 4 * kRows; ++i) {
    halves[2 * (i / 4)][i % 4] = c[i / 4][i % 4];
    halves[2 * (i / 4) + 1][i % 4] = to_even(c[i / 4][i % 4]);
  }
  philox_even<kRounds>(halves, key);
  BURNISH_UNROLL for (int i = 0; i < 4 * kRows; ++i) {
    c[i / 4][i % 4] = woven(halves[2 * (i / 4)][i % 4], halves[2 * (i / 4) + 1][i % 4]);
  }
}

#endif

}  // namespace burnish::BURNISH_ISA
