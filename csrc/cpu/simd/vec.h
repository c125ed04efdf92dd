// A vector of floats of the level being compiled, with the operations that math/activation.h asks for.
// BURNISH_ISA names the level and the namespace; generic is one plain float.
#pragma once

#include "cpu/kernels.h"
#include "math/activation.h"
#include "math/half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define BURNISH_INLINE inline __attribute__((always_inline))
#define BURNISH_UNROLL _Pragma("GCC unroll 32")

namespace burnish::BURNISH_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
  Vec() = default;
  BURNISH_INLINE explicit Vec(float a) : v(_mm512_set1_ps(a)) {}
  BURNISH_INLINE explicit Vec(__m512 a) : v(a) {}
};
BURNISH_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.v, b.v)); }
BURNISH_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.v, b.v)); }
BURNISH_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.v, b.v)); }
BURNISH_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.v, b.v)); }
BURNISH_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }
BURNISH_INLINE Vec square_root(Vec a) { return Vec(_mm512_sqrt_ps(a.v)); }
BURNISH_INLINE Vec absolute(Vec a) {
  return Vec(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))));
}
BURNISH_INLINE __mmask16 less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
BURNISH_INLINE Vec select(__mmask16 condition, Vec a, Vec b) { return Vec(_mm512_mask_blend_ps(condition, b.v, a.v)); }
// vminps and vmaxps give their second operand at NaN
BURNISH_INLINE Vec at_most(Vec a, Vec limit) { return Vec(_mm512_min_ps(limit.v, a.v)); }
BURNISH_INLINE Vec at_least(Vec a, Vec limit) { return Vec(_mm512_max_ps(limit.v, a.v)); }
// a NaN comes out quiet
BURNISH_INLINE Vec maximum(Vec a, Vec b) {
  return Vec(_mm512_mask_add_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v, a.v));
}
BURNISH_INLINE Vec power_of_two(Vec shifted) {
  const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return Vec(_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000))));
}

BURNISH_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

// Loads and stores of `count` (at most kLanes) elements; absent ones load as zero. Whole vectors take no mask: a masked
// store of bytes or words costs this kind of CPU tens of cycles.
BURNISH_INLINE __m256i load_words(const void* p, int64_t count) {
  if (count >= 16) [[likely]]
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm256_maskz_loadu_epi16(first_lanes(count), p);
}
BURNISH_INLINE void store_words(void* p, __m256i words, int64_t count) {
  if (count >= 16) [[likely]] {
    _mm256_storeu_si256(static_cast<__m256i*>(p), words);
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(count), words);
  }
}
BURNISH_INLINE Vec load(const float* p, int64_t count) {
  if (count >= 16) [[likely]]
    return Vec(_mm512_loadu_ps(p));
  return Vec(_mm512_maskz_loadu_ps(first_lanes(count), p));
}
BURNISH_INLINE Vec load(const bf16* p, int64_t count) {
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p, count)), 16)));
}
BURNISH_INLINE Vec load(const fp16* p, int64_t count) { return Vec(_mm512_cvtph_ps(load_words(p, count))); }
BURNISH_INLINE void store(float* p, Vec a, int64_t count) {
  if (count >= 16) [[likely]] {
    _mm512_storeu_ps(p, a.v);
  } else {
    _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
  }
}
// Of numbers none of which is subnormal: the instruction flushes those.
BURNISH_INLINE __m256i normal_to_bf16(Vec a) {
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  __m256i words;
  memcpy(&words, &rounded, sizeof words);
  return words;
}
BURNISH_INLINE __m256i to_bf16(Vec a) {
  constexpr int kSubnormal = 0x20;
  if (!_mm512_fpclass_ps_mask(a.v, kSubnormal)) [[likely]]
    return normal_to_bf16(a);
  // round as integers
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
BURNISH_INLINE void store(bf16* p, Vec a, int64_t count) { store_words(p, to_bf16(a), count); }
// A line of 32, past the caches: it is there for other threads, and for what writes it again, after end_stream.
BURNISH_INLINE void stream(bf16* p, Vec low, Vec high) {
  const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
}
BURNISH_INLINE void store(fp16* p, Vec a, int64_t count) {
  store_words(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), count);
}
BURNISH_INLINE Vec from_int32(const int32_t* p, int32_t offset) {
  return Vec(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(offset))));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
  Vec() = default;
  BURNISH_INLINE explicit Vec(float a) : v(_mm256_set1_ps(a)) {}
  BURNISH_INLINE explicit Vec(__m256 a) : v(a) {}
};
BURNISH_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, b.v)); }
BURNISH_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.v, b.v)); }
BURNISH_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.v, b.v)); }
BURNISH_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.v, b.v)); }
BURNISH_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
BURNISH_INLINE Vec square_root(Vec a) { return Vec(_mm256_sqrt_ps(a.v)); }
BURNISH_INLINE Vec absolute(Vec a) {
  return Vec(_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))));
}
BURNISH_INLINE __m256 less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
BURNISH_INLINE Vec select(__m256 condition, Vec a, Vec b) { return Vec(_mm256_blendv_ps(b.v, a.v, condition)); }
// vminps and vmaxps give their second operand at NaN
BURNISH_INLINE Vec at_most(Vec a, Vec limit) { return Vec(_mm256_min_ps(limit.v, a.v)); }
BURNISH_INLINE Vec at_least(Vec a, Vec limit) { return Vec(_mm256_max_ps(limit.v, a.v)); }
// a NaN comes out quiet
BURNISH_INLINE Vec maximum(Vec a, Vec b) {
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return Vec(_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), _mm256_add_ps(a.v, a.v), nan));
}
BURNISH_INLINE Vec power_of_two(Vec shifted) {
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return Vec(_mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000))));
}

// A partial load or store goes through a small buffer: AVX2 has no 16-bit masks.
template <class T>
struct alignas(32) Buffer {
  T data[Vec::kLanes] = {};
};
BURNISH_INLINE Vec load_all(const float* p) { return Vec(_mm256_loadu_ps(p)); }
BURNISH_INLINE Vec load_all(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
}
BURNISH_INLINE Vec load_all(const fp16* p) {
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
BURNISH_INLINE void store_all(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
BURNISH_INLINE void store_all(bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
  const __m256i kept = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan));
  const __m256i high = _mm256_srli_epi32(kept, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
BURNISH_INLINE void store_all(fp16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <class T>
BURNISH_INLINE Vec load(const T* p, int64_t count) {
  if (count >= Vec::kLanes) return load_all(p);
  Buffer<T> buffer;
  for (int64_t i = 0; i < count; ++i) buffer.data[i] = p[i];
  return load_all(buffer.data);
}
template <class T>
BURNISH_INLINE void store(T* p, Vec a, int64_t count) {
  if (count >= Vec::kLanes) return store_all(p, a);
  Buffer<T> buffer;
  store_all(buffer.data, a);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer.data[i];
}
BURNISH_INLINE Vec from_int32(const int32_t* p, int32_t offset) {
  const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset))));
}

#else

struct Vec {
  static constexpr int kLanes = 1;
  float v;
  Vec() = default;
  BURNISH_INLINE explicit Vec(float a) : v(a) {}
};
BURNISH_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
BURNISH_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
BURNISH_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
BURNISH_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
BURNISH_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(burnish::fma(a.v, b.v, c.v)); }
BURNISH_INLINE Vec square_root(Vec a) { return Vec(std::sqrt(a.v)); }
BURNISH_INLINE Vec absolute(Vec a) { return Vec(burnish::absolute(a.v)); }
BURNISH_INLINE bool less(Vec a, Vec b) { return a.v < b.v; }
BURNISH_INLINE Vec select(bool condition, Vec a, Vec b) { return condition ? a : b; }
BURNISH_INLINE Vec at_most(Vec a, Vec limit) { return Vec(burnish::at_most(a.v, limit.v)); }
BURNISH_INLINE Vec at_least(Vec a, Vec limit) { return Vec(burnish::at_least(a.v, limit.v)); }
BURNISH_INLINE Vec maximum(Vec a, Vec b) { return Vec(a.v != a.v || a.v > b.v ? a.v : b.v); }
BURNISH_INLINE Vec power_of_two(Vec shifted) { return Vec(burnish::power_of_two(shifted.v)); }
template <class T>
BURNISH_INLINE Vec load(const T* p, int64_t) {
  return Vec(to_float(*p));
}
template <class T>
BURNISH_INLINE void store(T* p, Vec a, int64_t) {
  *p = from_float<T>(a.v);
}
BURNISH_INLINE Vec from_int32(const int32_t* p, int32_t offset) {
  return Vec(static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(*p) - static_cast<uint32_t>(offset))));
}

#endif

constexpr bool kStreams = Vec::kLanes == 16;  // whether there is stream
BURNISH_INLINE void end_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

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

// Calls f with a null pointer of the C++ type of a format.
template <class F>
BURNISH_INLINE auto with_type(Format format, F f) {
  switch (format) {
    case Format::kBf16:
      return f(static_cast<bf16*>(nullptr));
    case Format::kFp16:
      return f(static_cast<fp16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace burnish::BURNISH_ISA
