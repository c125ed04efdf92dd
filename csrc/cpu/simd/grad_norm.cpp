// Sums of squares. The square of a 16- or 32-bit float is exact in double, so only the order of the sums decides their
// bits: kSums of them, element i in sum i % kSums, added in order at the end, at every level.
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kSums = 32;

template <class T>
void add_rest(const T* x, int64_t from, int64_t count, double (&sums)[kSums]) {
  for (int64_t i = from; i < count; ++i) {
    const double value = to_float(x[i]);
    sums[i % kSums] += value * value;
  }
}

template <class T>
double sum(const T* x, int64_t count) {
  alignas(64) double sums[kSums] = {};
  int64_t i = 0;
#if defined(__AVX512F__)
  __m512d total[4] = {};
  for (; i + kSums <= count; i += kSums) {
    BURNISH_UNROLL for (int k = 0; k < 2; ++k) {
      const __m512 x16 = load(x + i + 16 * k, 16).v;
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x16));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x16, 1));
      total[2 * k] = _mm512_fmadd_pd(low, low, total[2 * k]);
      total[2 * k + 1] = _mm512_fmadd_pd(high, high, total[2 * k + 1]);
    }
  }
  for (int k = 0; k < 4; ++k) _mm512_store_pd(sums + 8 * k, total[k]);
#elif defined(__AVX2__)
  __m256d total[8] = {};
  for (; i + kSums <= count; i += kSums) {
    BURNISH_UNROLL for (int k = 0; k < 4; ++k) {
      const __m256 x8 = load_all(x + i + 8 * k).v;
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x8));
      const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x8, 1));
      total[2 * k] = _mm256_fmadd_pd(low, low, total[2 * k]);
      total[2 * k + 1] = _mm256_fmadd_pd(high, high, total[2 * k + 1]);
    }
  }
  for (int k = 0; k < 8; ++k) _mm256_store_pd(sums + 4 * k, total[k]);
#endif
  add_rest(x, i, count, sums);
  double result = 0;
  for (const double one : sums) result += one;
  return result;
}

}  // namespace

double sum_squares(const void* x, Format format, int64_t count) {
  return with_type(
      format, [&](auto* type) { return sum(static_cast<const std::remove_pointer_t<decltype(type)>*>(x), count); });
}

}  // namespace burnish::BURNISH_ISA
