// One row of floats to int8 by the rule of math/int8.h: a pass for the largest magnitude, a pass that rounds.
#include "cpu/simd/level.h"
#include "math/int8.h"

namespace burnish::BURNISH_ISA {
namespace {

// Exact and order-free in every level: an integer maximum of magnitudes.
template <class T>
uint32_t largest_magnitude(const T* x, int64_t width) {
  uint32_t largest = 0;
  int64_t k = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i a = _mm512_setzero_si512(), b = a;
  for (; k + 32 <= width; k += 32) {
    a = _mm512_max_epu32(a, _mm512_and_si512(_mm512_castps_si512(load(x + k, 16).v), mask));
    b = _mm512_max_epu32(b, _mm512_and_si512(_mm512_castps_si512(load(x + k + 16, 16).v), mask));
  }
  for (; k < width; k += 16) {
    a = _mm512_max_epu32(a, _mm512_and_si512(_mm512_castps_si512(load(x + k, width - k).v), mask));
  }
  largest = _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
#elif defined(__AVX2__)
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i a = _mm256_setzero_si256();
  for (; k + 8 <= width; k += 8) {
    a = _mm256_max_epu32(a, _mm256_and_si256(_mm256_castps_si256(load_all(x + k).v), mask));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a);
  for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
#endif
  for (; k < width; ++k) {
    const uint32_t bits = magnitude_bits(to_float(x[k]));
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// q = rint(x * inverse) for a finite row; returns sum(q).
template <class T>
int32_t round_row(const T* x, int64_t width, float inverse, int8_t* q) {
  int32_t sum = 0;
  int64_t k = 0;
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(inverse);
  // conversion rounds to nearest even by MXCSR, which nothing here changes
  const auto round = [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(load(x + at, count).v, factor));
  };
  // packing works within 128-bit lanes; this puts the lanes' words back in order
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_setzero_si512();
  for (; k + 64 <= width; k += 64) {
    const __m512i low = _mm512_packs_epi32(round(k, 16), round(k + 16, 16));
    const __m512i high = _mm512_packs_epi32(round(k + 32, 16), round(k + 48, 16));
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    sums = _mm512_dpbusd_epi32(sums, ones, bytes);
    _mm512_storeu_si512(q + k, bytes);
  }
  for (; k < width; k += 16) {
    const __m512i rounded = round(k, width - k);
    sums = _mm512_add_epi32(sums, rounded);
    _mm_mask_storeu_epi8(q + k, first_lanes(width - k), _mm512_cvtepi32_epi8(rounded));
  }
  sum = _mm512_reduce_add_epi32(sums);
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i sums = _mm256_setzero_si256();
  for (; k + 8 <= width; k += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(load_all(x + k).v, factor));
    sums = _mm256_add_epi32(sums, rounded);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + k), _mm_packs_epi16(words, words));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
  for (const int32_t lane : lanes) sum += lane;
#endif
  for (; k < width; ++k) {
    const int32_t rounded = quantize(to_float(x[k]), 1.0f, inverse);
    sum += rounded;
    q[k] = static_cast<int8_t>(rounded);
  }
  return sum;
}

template <class T>
int32_t quantize_elements(const T* x, int64_t width, int64_t padded, int8_t* q, float* scale) {
  const uint32_t largest = largest_magnitude(x, width);
  const RowScale rule = row_scale(largest);
  *scale = rule.scale;
  if (padded > width) memset(q + width, 0, static_cast<size_t>(padded - width));
  if (largest < kInfinityBits) return 128 * round_row(x, width, rule.inverse, q);
  int32_t sum = 0;  // a row with NaN or Inf is rare: element by element
  for (int64_t k = 0; k < width; ++k) {
    const int32_t rounded = quantize(to_float(x[k]), rule.amax, rule.inverse);
    sum += rounded;
    q[k] = static_cast<int8_t>(rounded);
  }
  return 128 * sum;
}

}  // namespace

int32_t quantize_row(const void* x, Format format, int64_t width, int64_t padded, int8_t* q, float* scale) {
  return with_type(format, [&](auto* type) {
    return quantize_elements(static_cast<decltype(type)>(const_cast<void*>(x)), width, padded, q, scale);
  });
}

}  // namespace burnish::BURNISH_ISA
