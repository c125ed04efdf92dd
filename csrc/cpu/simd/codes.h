// Moments in 8-bit codes, see math/moments.h. A step is two passes over a block: one gives the moments and the largest
// of each kind, from which follows the scale (roots keep the order, so the root of the largest is the largest root),
// the other the codes. Square roots are what a block waits for, so each pass takes a share of them.
#pragma once

#include "cpu/simd/vec.h"
#include "math/moments.h"
#include "optimizer.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512F__)

BURNISH_INLINE Vec load_codes(const void* p, bool is_signed, int64_t count) {
  const __m128i codes =
      count >= 16 ? _mm_loadu_si128(static_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(first_lanes(count), p);
  return Vec(_mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes)));
}
// The low bytes of the lanes' bits.
BURNISH_INLINE void store_bytes(void* p, Vec a, int64_t count) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v));
  if (count >= 16) [[likely]] {
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
  } else {
    _mm_mask_storeu_epi8(p, first_lanes(count), bytes);
  }
}
// The greater by their bits, so that what is negative or not finite is greater than what is.
BURNISH_INLINE Vec greater_bits(Vec a, Vec b) {
  return Vec(_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v))));
}
BURNISH_INLINE float greatest_lane(Vec a) { return bits_float(_mm512_reduce_max_epu32(_mm512_castps_si512(a.v))); }

#elif defined(__AVX2__)

BURNISH_INLINE Vec load_codes(const void* p, bool is_signed, int64_t count) {
  int64_t held = 0;
  memcpy(&held, p, count >= Vec::kLanes ? sizeof held : static_cast<size_t>(count));
  const __m128i codes = _mm_cvtsi64_si128(held);
  return Vec(_mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(codes) : _mm256_cvtepu8_epi32(codes)));
}
// The low bytes of the lanes' bits.
BURNISH_INLINE void store_bytes(void* p, Vec a, int64_t count) {
  const __m256i low = _mm256_shuffle_epi8(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x0c080400));
  const __m256i halves = _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
  const int64_t bytes = _mm256_extract_epi64(halves, 0);
  memcpy(p, &bytes, count >= Vec::kLanes ? sizeof bytes : static_cast<size_t>(count));
}
// The greater by their bits, so that what is negative or not finite is greater than what is.
BURNISH_INLINE Vec greater_bits(Vec a, Vec b) {
  return Vec(_mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v))));
}
BURNISH_INLINE float greatest_lane(Vec a) {
  a = greater_bits(a, Vec(_mm256_permute2f128_ps(a.v, a.v, 0x01)));
  a = greater_bits(a, Vec(_mm256_permute_ps(a.v, 0x4e)));
  return _mm256_cvtss_f32(greater_bits(a, Vec(_mm256_permute_ps(a.v, 0xb1))).v);
}

#else

BURNISH_INLINE Vec load_codes(const void* p, bool is_signed, int64_t) {
  return Vec(is_signed ? *static_cast<const int8_t*>(p) : *static_cast<const uint8_t*>(p));
}
// The low bytes of the lanes' bits.
BURNISH_INLINE void store_bytes(void* p, Vec a, int64_t) {
  *static_cast<uint8_t*>(p) = static_cast<uint8_t>(float_bits(a.v));
}
// The greater by their bits, so that what is negative or not finite is greater than what is.
BURNISH_INLINE Vec greater_bits(Vec a, Vec b) { return float_bits(a.v) > float_bits(b.v) ? a : b; }
BURNISH_INLINE float greatest_lane(Vec a) { return a.v; }

#endif

BURNISH_INLINE Vec decoded(const void* codes, bool is_signed, Vec scale, int64_t count) {
  const Vec root = load_codes(codes, is_signed, count) * scale;
  if (is_signed) return root * absolute(root);
  const Vec square = root * root;
  return square * square;
}

// The first pass of a kind's codes: what the second takes, a first moment or the root of a second one.
struct Halfway {
  alignas(64) float values[kStateBlock];
  Vec greatest{0.0f};

  BURNISH_INLINE void put(Vec moment, bool is_signed, int64_t i, int64_t count) {
    store(values + i, is_signed ? moment : square_root(moment), count);
    Vec size = is_signed ? absolute(moment) : moment + Vec(0.0f);  // -0 is no negative number
    if (count < Vec::kLanes) {
      alignas(64) float lanes[Vec::kLanes];
      store(lanes, size, Vec::kLanes);
      size = load(lanes, count);
    }
    greatest = greater_bits(greatest, size);
  }
};

BURNISH_INLINE CodeScale scale_for(Vec greatest, bool is_signed) {
  const float root = std::sqrt(greatest_lane(greatest)), largest = is_signed ? root : std::sqrt(root);
  return code_scale(float_bits(largest) & 0x7fffffffu, is_signed ? kFirstLimit : kSecondLimit);
}

// The second pass.
BURNISH_INLINE void encode(const Halfway& half, bool is_signed, float factor, void* codes, int64_t count) {
  if (factor == 0.0f) {
    memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  // half to even: 1.5 * 2^23 leaves a small integer in the low bits
  const Vec zero(0.0f), one(1.0f), inverse(factor), rounder(12582912.0f);
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const Vec value = load(half.values + i, count - i);
    Vec code;
    if (is_signed) {
      const Vec size = square_root(absolute(value)) * inverse;
      code = select(less(value, zero), zero - size, size);
    } else {
      const Vec size = square_root(value) * inverse;
      code = select(less(zero, value), at_least(size, one), size);
    }
    store_bytes(static_cast<char*>(codes) + i, code + rounder, count - i);
  }
}

// Floats or 16-bit floats, from the first element of a block on.
struct Place {
  void* data;
  Format format;
};

inline Place place_of(void* data, Format format, int64_t at) {
  return {static_cast<char*>(data) + at * size_of(format), format};
}

BURNISH_INLINE Vec load_from(Place from, int64_t i, int64_t count) {
  if (from.format == Format::kFloat) return load(static_cast<const float*>(from.data) + i, count);
  if (from.format == Format::kBf16) return load(static_cast<const bf16*>(from.data) + i, count);
  return load(static_cast<const fp16*>(from.data) + i, count);
}

BURNISH_INLINE void store_to(Place to, int64_t i, Vec value, int64_t count) {
  if (to.format == Format::kFloat) return store(static_cast<float*>(to.data) + i, value, count);
  if (to.format == Format::kBf16) return store(static_cast<bf16*>(to.data) + i, value, count);
  store(static_cast<fp16*>(to.data) + i, value, count);
}

// A step of at most a block whose moments are codes; codes[k] and scales[k] are the block's of kind k.
template <class Element>
void step_coded(const typename Element::Scalars& scalars, Place parameter, Place gradient, void* const* codes,
                float* const* scales, int64_t count) {
  constexpr int kKinds = Element::kMoments, kKept = kKinds > 0 ? kKinds : 1;
  Halfway half[kKept];
  Vec scale[kKept];
  const char* from[kKept] = {};
  for (int k = 0; k < kKinds; ++k) {
    scale[k] = Vec(*scales[k]);
    from[k] = static_cast<const char*>(codes[k]);
  }
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int64_t left = count - i;
    Vec held[kKept];
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
      held[k] = decoded(from[k] + i, Element::signed_moment(k), scale[k], left);
    }
    const Vec next = Element::step(scalars, load_from(parameter, i, left), load_from(gradient, i, left), held);
    store_to(parameter, i, next, left);
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) half[k].put(held[k], Element::signed_moment(k), i, left);
  }
  CodeScale rules[kKept];
  for (int k = 0; k < kKinds; ++k)
    *scales[k] = (rules[k] = scale_for(half[k].greatest, Element::signed_moment(k))).scale;
  for (int k = 0; k < kKinds; ++k) encode(half[k], Element::signed_moment(k), rules[k].inverse, codes[k], count);
}

}  // namespace burnish::BURNISH_ISA
