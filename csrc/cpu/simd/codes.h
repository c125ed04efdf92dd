// Moments in 8-bit codes, see math/moments.h. A step is two passes over a block: one gives the moments and the largest
// of each kind, from which follows the scale (roots keep the order, so the root of the largest is the largest root),
// the other the codes. The scale takes a chain of roots and divisions, so a block's second pass comes after the first
// of the next block.
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

// What the largest is sought among; 0 in lanes past `count`.
BURNISH_INLINE Vec sought(Vec moment, bool is_signed, int64_t count) {
  const Vec size = is_signed ? absolute(moment) : moment + Vec(0.0f);  // -0 is no negative number
  if (count >= Vec::kLanes) [[likely]]
    return size;
  alignas(64) float lanes[Vec::kLanes];
  store(lanes, size, Vec::kLanes);
  return load(lanes, count);
}

// A block between its passes.
template <class Element>
struct Halfway {
  static constexpr int kKept = Element::kMoments > 0 ? Element::kMoments : 1;
  alignas(64) float values[kKept][kStateBlock];  // what the second pass takes: first moments, roots of second ones
  float inverse[kKept];
  void* codes[kKept];
  int64_t count = 0;
};

BURNISH_INLINE CodeScale scale_for(Vec greatest, bool is_signed) {
  const float root = std::sqrt(greatest_lane(greatest)), largest = is_signed ? root : std::sqrt(root);
  return code_scale(float_bits(largest) & 0x7fffffffu, is_signed ? kFirstLimit : kSecondLimit);
}

// Codes of what the first pass kept, in the low bytes.
template <bool kSigned>
BURNISH_INLINE Vec codes_of(Vec value, Vec inverse) {
  // half to even: 1.5 * 2^23 leaves a small integer in the low bits
  const Vec zero(0.0f), one(1.0f), rounder(12582912.0f);
  Vec code;
  if constexpr (kSigned) {
    const Vec size = square_root(absolute(value)) * inverse;
    code = select(less(value, zero), zero - size, size);
  } else {
    const Vec size = square_root(value) * inverse;
    code = select(less(zero, value), at_least(size, one), size);
  }
  return code + rounder;
}

template <bool kSigned>
BURNISH_INLINE void encode_exactly(const float* values, float inverse, char* codes, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    store_bytes(codes + i, codes_of<kSigned>(load(values + i, count - i), Vec(inverse)), count - i);
  }
}

#if defined(__AVX512F__)

// The same codes without the divider, which the first pass keeps busy: the root is near enough that its code is certain
// but beside the middle between two codes. A code stands above sixteen bits of its fraction.
template <bool kSigned>
struct NearCodes {
  // 2^-16 of a code: the root, its product and the code that is asked for are off by 3, or 5.6
  static constexpr int kMargin = 8;
  static constexpr float kLeast = 0x1p-126f;
  // with greater factors, first moments that have a code are not all normal numbers; roots of second ones always are
  static constexpr float kMostInverse = kSigned ? kFirstLimit * 0x1p50f : kSecondLimit / kRootFloor;

  // The middle below a code becomes kMargin.
  static BURNISH_INLINE __m512i bits(Vec value, float inverse) {
    constexpr int kGreaterSize = 0b1011, kOrAnd = 0xf8;  // the greater of two sizes; a | (b & c)
    const Vec middle(0x1p15f + kMargin), least(0x1p16f + 0x1p15f + kMargin);
    const Vec size = kSigned ? Vec(_mm512_range_ps(value.v, Vec(kLeast).v, kGreaterSize)) : value;
    Vec about(_mm512_rsqrt14_ps(size.v));
    if constexpr (kSigned) {
      about = Vec(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
          _mm512_castps_si512(about.v), _mm512_castps_si512(value.v), _mm512_set1_epi32(INT32_MIN), kOrAnd)));
    }
    const Vec root = size * about, newton(_mm512_fnmadd_ps(root.v, about.v, Vec(3.0f).v));
    Vec code = fma(root * Vec(0x1p15f * inverse), newton, middle);
    if constexpr (!kSigned) code = Vec(_mm512_mask_max_ps(middle.v, less(Vec(0.0f), value), code.v, least.v));
    return _mm512_cvtps_epi32(code.v);
  }
};

constexpr int64_t kTogether = 64;  // codes that are stored as one vector

// The third byte of each lane.
BURNISH_INLINE void store_third_bytes(char* to, const __m512i (&bits)[4]) {
  alignas(64) static constexpr struct Order {
    uint8_t from[64];
    constexpr Order() : from() {
      for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(4 * (i % 32) + 2);
    }
  } kOrder;
  const __m512i order = _mm512_load_si512(kOrder.from);
  const __m512i low = _mm512_maskz_permutex2var_epi8(0x00000000ffffffff, bits[0], order, bits[1]);
  const __m512i high = _mm512_maskz_permutex2var_epi8(0xffffffff00000000, bits[2], order, bits[3]);
  _mm512_storeu_si512(to, _mm512_or_si512(low, high));
}

template <bool kSigned>
BURNISH_INLINE void encode_values(const float* values, float inverse, char* codes, int64_t count) {
  using Near = NearCodes<kSigned>;
  const __m512i wide = _mm512_set1_epi32(0x10000 - 2 * Near::kMargin);  // fractions of codes that are certain
  int64_t i = 0;
  for (; inverse <= Near::kMostInverse && i + kTogether <= count; i += kTogether) {
    __m512i bits[4], least = wide;
    BURNISH_UNROLL for (int j = 0; j < 4; ++j) {
      bits[j] = Near::bits(load(values + i + j * Vec::kLanes, Vec::kLanes), inverse);
      least = _mm512_min_epu16(least, bits[j]);
    }
    if (_mm512_testn_epi32_mask(least, wide) == 0) [[likely]] {
      store_third_bytes(codes + i, bits);
    } else {
      encode_exactly<kSigned>(values + i, inverse, codes + i, kTogether);
    }
  }
  encode_exactly<kSigned>(values + i, inverse, codes + i, count - i);
}

#else

template <bool kSigned>
BURNISH_INLINE void encode_values(const float* values, float inverse, char* codes, int64_t count) {
  encode_exactly<kSigned>(values, inverse, codes, count);
}

#endif

// The second pass.
template <class Element>
void encode(const Halfway<Element>& half) {
  if (half.count == 0) return;
  BURNISH_UNROLL for (int k = 0; k < Element::kMoments; ++k) {
    auto* const codes = static_cast<char*>(half.codes[k]);
    if (half.inverse[k] == 0.0f) {
      memset(codes, 0, static_cast<size_t>(half.count));
    } else {
      (Element::signed_moment(k) ? encode_values<true> : encode_values<false>)(half.values[k], half.inverse[k], codes,
                                                                               half.count);
    }
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

// Whether the parameter has a loop of its own, after that of the moments: of the chain from a code to the parameter a
// processor does not hold enough elements at a time to keep its divider busy.
template <class Element>
constexpr bool kHalves = requires { &Element::template finish<Vec>; };

// The first pass of a step of half.count elements, whose codes are half.codes; scales[k] is the block's of kind k.
template <class Element>
void step_coded(const typename Element::Scalars& scalars, Place parameter, Place gradient, float* const* scales,
                Halfway<Element>& half) {
  constexpr int kKinds = Element::kMoments, kKept = Halfway<Element>::kKept;
  Vec scale[kKept], greatest[kKept];
  const char* from[kKept] = {};
  BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
    scale[k] = Vec(*scales[k]);
    greatest[k] = Vec(0.0f);
    from[k] = static_cast<const char*>(half.codes[k]);
  }
  for (int64_t i = 0; i < half.count; i += Vec::kLanes) {
    const int64_t left = half.count - i;
    Vec held[kKept];
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
      held[k] = decoded(from[k] + i, Element::signed_moment(k), scale[k], left);
    }
    const Vec before = load_from(parameter, i, left), slope = load_from(gradient, i, left);
    if constexpr (kHalves<Element>) {
      Element::advance(scalars, before, slope, held);
    } else {
      store_to(parameter, i, Element::step(scalars, before, slope, held), left);
    }
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
      const bool is_signed = Element::signed_moment(k);
      store(half.values[k] + i, is_signed ? held[k] : square_root(held[k]), left);
      greatest[k] = greater_bits(greatest[k], sought(held[k], is_signed, left));
    }
  }
  if constexpr (kHalves<Element>) {
    for (int64_t i = 0; i < half.count; i += Vec::kLanes) {
      const int64_t left = half.count - i;
      const Vec first = load(half.values[0] + i, left), root = load(half.values[kKinds - 1] + i, left);
      store_to(parameter, i, Element::finish(scalars, load_from(parameter, i, left), first, root), left);
    }
  }
  BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
    const CodeScale rule = scale_for(greatest[k], Element::signed_moment(k));
    *scales[k] = rule.scale;
    half.inverse[k] = rule.inverse;
  }
}

}  // namespace burnish::BURNISH_ISA
