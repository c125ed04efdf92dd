// A square of words that changes rows for columns in registers.
#pragma once

#include "cpu/simd/vec.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512F__)

// 16 x 16 words of 32 bits: row i, word j to row j, word i.
BURNISH_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  BURNISH_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  BURNISH_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// A vector of floats a row, as many rows as lanes.
BURNISH_INLINE void transpose(Vec (&r)[16]) {
  __m512i words[16];
  BURNISH_UNROLL for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(r[i].v);
  transpose(words);
  BURNISH_UNROLL for (int i = 0; i < 16; ++i) r[i] = Vec(_mm512_castsi512_ps(words[i]));
}

#elif defined(__AVX2__)

// 8 x 8 floats.
BURNISH_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8], u[8];
  BURNISH_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  BURNISH_UNROLL for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = Vec(_mm256_permute2f128_ps(u[i], u[i + 4], 0x20));
    r[i + 4] = Vec(_mm256_permute2f128_ps(u[i], u[i + 4], 0x31));
  }
}

// 8 x 8 words of 16 bits.
BURNISH_INLINE void transpose(__m128i (&r)[8]) {
  __m128i t[8];
  BURNISH_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm_unpacklo_epi16(r[i], r[i + 1]);
    t[i + 1] = _mm_unpackhi_epi16(r[i], r[i + 1]);
  }
  BURNISH_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm_unpacklo_epi32(t[i], t[i + 2]);
    r[i + 1] = _mm_unpackhi_epi32(t[i], t[i + 2]);
    r[i + 2] = _mm_unpacklo_epi32(t[i + 1], t[i + 3]);
    r[i + 3] = _mm_unpackhi_epi32(t[i + 1], t[i + 3]);
  }
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm_unpacklo_epi64(r[i], r[i + 4]);
    t[2 * i + 1] = _mm_unpackhi_epi64(r[i], r[i + 4]);
  }
  BURNISH_UNROLL for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#else

BURNISH_INLINE void transpose(Vec (&)[1]) {}

#endif

}  // namespace burnish::BURNISH_ISA
