// Blocks of a parameter's step, for every optimizer: what is not fp32 is staged through buffers of a block that stay in
// the first-level cache, so that one loop over floats does the maths of every mix of formats. fp32 is worked on where
// it lies. The maths is an element of math/<optimizer>.h.
#pragma once

#include "cpu/simd/level.h"
#include "cpu/simd/philox.h"
#include "math/moments.h"
#include "math/rounding.h"

namespace burnish::BURNISH_ISA {

struct alignas(64) Staged {
  float parameter[kStateBlock], gradient[kStateBlock], moments[kMostMoments][kStateBlock];
  uint16_t random[kStateBlock];
};

// `count` elements from `at` on as floats: where they are, or converted into `spare`.
inline float* take(const void* data, Format format, int64_t at, int64_t count, float* spare) {
  if (format == Format::kFloat) return static_cast<float*>(const_cast<void*>(data)) + at;
  with_type(format, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(data)) + at;
    for (int64_t i = 0; i < count; i += Vec::kLanes) store(spare + i, load(from + i, count - i), count - i);
  });
  return spare;
}

// Back from `spare`, rounded to nearest; nothing where the floats lie in their place.
inline void put(const float* spare, void* data, Format format, int64_t at, int64_t count) {
  if (format == Format::kFloat) return;
  with_type(format, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(data) + at;
    for (int64_t i = 0; i < count; i += Vec::kLanes) store(to + i, load(spare + i, count - i), count - i);
  });
}

// Sixteen random bits for each element of the block at `at`.
inline void draw(const OptimizerRule& rule, uint32_t tensor, uint32_t stream, int64_t at, uint16_t* random) {
  const auto group = static_cast<uint64_t>(at / kRoundingGroup);
#if defined(__AVX512F__)
  // lane 4 j + t counts group 4 t + j, so that transposing fours of words leaves the groups in order
  const __m512i count = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (uint64_t g = 0; g < kStateBlock / kRoundingGroup; g += 16) {
    // a block's groups share the high word of their count: 2^32 is a multiple of a block's
    __m512i w[4] = {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(group + g)), count),
                    _mm512_set1_epi32(static_cast<int32_t>((group + g) >> 32)),
                    _mm512_set1_epi32(static_cast<int32_t>(tensor)), _mm512_set1_epi32(static_cast<int32_t>(stream))};
    philox16(w, rule.seed);
    const __m512i a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
    const __m512i c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
    uint16_t* const to = random + g * kRoundingGroup;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(to + 32, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(to + 64, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(to + 96, _mm512_unpackhi_epi64(b, d));
  }
#else
  for (uint64_t g = 0; g < kStateBlock / kRoundingGroup; ++g) {
    const Philox words = rounding_words(rule.seed, tensor, stream, group + g);
    for (int i = 0; i < kRoundingGroup; ++i) {
      random[g * kRoundingGroup + static_cast<uint64_t>(i)] = static_cast<uint16_t>(words.word[i / 2] >> 16 * (i % 2));
    }
  }
#endif
}

// Back from `spare`, rounded by `random`.
inline void put_random(const float* spare, void* data, Format format, int64_t at, int64_t count,
                       const uint16_t* random) {
  if (format == Format::kBf16) {
    auto* to = static_cast<bf16*>(data) + at;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
      const __m512i bits = _mm512_castps_si512(load(spare + i, 16).v);
      const __m512i sum = _mm512_add_epi32(bits, _mm512_cvtepu16_epi32(load_words(random + i, 16)));
      const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
      const __m512i kept = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
      store_words(to + i, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)), 16);
    }
#endif
    for (; i < count; ++i) to[i] = round_random<bf16>(spare[i], random[i]);
  } else if (format == Format::kFp16) {
    auto* to = static_cast<fp16*>(data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = round_random<fp16>(spare[i], random[i]);
  }
}

// The floats of moment `kind` of the block at `at`, of codes.
inline void decode(const OptimizerTensor& tensor, int kind, bool is_signed, int64_t at, int64_t count, float* values) {
  const int64_t blocks = (tensor.count + kStateBlock - 1) / kStateBlock;
  const float scale = tensor.scales[kind * blocks + at / kStateBlock];
  if (is_signed) {
    const auto* codes = static_cast<const int8_t*>(tensor.moments[kind]) + at;
    for (int64_t i = 0; i < count; ++i) values[i] = first_value(codes[i], scale);
  } else {
    const auto* codes = static_cast<const uint8_t*>(tensor.moments[kind]) + at;
    for (int64_t i = 0; i < count; ++i) values[i] = second_value(codes[i], scale);
  }
}

inline void encode(const float* values, const OptimizerTensor& tensor, int kind, bool is_signed, int64_t at,
                   int64_t count) {
  alignas(64) float roots[kStateBlock];
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const Vec value = load(values + i, count - i);
    store(roots + i, is_signed ? first_root(value) : second_root(value), count - i);
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(roots[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const int64_t blocks = (tensor.count + kStateBlock - 1) / kStateBlock;
  const CodeScale rule = code_scale(largest, is_signed ? kFirstLimit : kSecondLimit);
  tensor.scales[kind * blocks + at / kStateBlock] = rule.scale;
  if (is_signed) {
    auto* codes = static_cast<int8_t*>(tensor.moments[kind]) + at;
    for (int64_t i = 0; i < count; ++i) codes[i] = first_code(values[i], roots[i], rule.inverse);
  } else {
    auto* codes = static_cast<uint8_t*>(tensor.moments[kind]) + at;
    for (int64_t i = 0; i < count; ++i) codes[i] = second_code(roots[i], rule.inverse);
  }
}

template <class T>
void join_block(const OptimizerTensor& tensor, int64_t at, int64_t count, float* values) {
  const auto* high = static_cast<const T*>(tensor.parameter) + at;
  const auto* low = static_cast<const uint8_t*>(tensor.master) + at;
  for (int64_t i = 0; i < count; ++i) values[i] = join(high[i], low[i]);
}

template <class T>
void split_block(const float* values, const OptimizerTensor& tensor, int64_t at, int64_t count) {
  auto* high = static_cast<T*>(tensor.parameter) + at;
  auto* low = static_cast<uint8_t*>(tensor.master) + at;
  for (int64_t i = 0; i < count; ++i) {
    const Split parts = split<T>(values[i]);
    high[i].bits = parts.high;
    low[i] = parts.low;
  }
}

// The fp32 values of the parameter, or of its master.
inline float* take_parameter(const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at, int64_t count,
                             float* spare) {
  if (rule.master == Master::kFloat) return static_cast<float*>(tensor.master) + at;
  if (rule.master == Master::kNone) return take(tensor.parameter, tensor.format, at, count, spare);
  (tensor.format == Format::kBf16 ? join_block<bf16> : join_block<fp16>)(tensor, at, count, spare);
  return spare;
}

inline void put_parameter(const float* values, const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at,
                          int64_t count, uint16_t* random) {
  if (rule.master == Master::kSplit) {
    (tensor.format == Format::kBf16 ? split_block<bf16> : split_block<fp16>)(values, tensor, at, count);
  } else if (rule.master == Master::kFloat && tensor.format == Format::kFloat) {
    memcpy(static_cast<float*>(tensor.parameter) + at, values, static_cast<size_t>(count) * sizeof(float));
  } else if (rule.master == Master::kNone && rule.random && tensor.format != Format::kFloat) {
    draw(rule, tensor.index, 1, at, random);
    put_random(values, tensor.parameter, tensor.format, at, count, random);
  } else {
    put(values, tensor.parameter, tensor.format, at, count);
  }
}

inline void average_block(const float* parameter, const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at,
                          int64_t count) {
  float* const average = tensor.average + at;
  for (int64_t i = 0; i < count; ++i) average[i] = average[i] * rule.average_kept + parameter[i] * rule.average_taken;
  if (tensor.mask == nullptr) return;
  for (int64_t i = 0; i < count; ++i) average[i] = tensor.mask[at + i] != 0 ? average[i] : 0.0f;
}

// The moments of a block as floats, in their place or staged.
template <class Element>
void take_moments(const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at, int64_t count, Staged& staged,
                  float** moments) {
  for (int k = 0; k < Element::kMoments; ++k) {
    moments[k] = rule.coded ? staged.moments[k] : take(tensor.moments[k], rule.moments, at, count, staged.moments[k]);
    if (rule.coded) decode(tensor, k, Element::signed_moment(k), at, count, moments[k]);
  }
}

template <class Element>
void put_moments(float* const* moments, const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at,
                 int64_t count, Staged& staged) {
  for (int k = 0; k < Element::kMoments; ++k) {
    if (rule.coded) {
      encode(moments[k], tensor, k, Element::signed_moment(k), at, count);
    } else if (rule.random && rule.moments == Format::kBf16) {
      draw(rule, tensor.index, static_cast<uint32_t>(2 + k), at, staged.random);
      put_random(moments[k], tensor.moments[k], rule.moments, at, count, staged.random);
    } else {
      put(moments[k], tensor.moments[k], rule.moments, at, count);
    }
  }
}

// The parameter to where it belongs, with what follows it: mask, average, master.
inline void finish_parameter(float* parameter, const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at,
                             int64_t count, Staged& staged) {
  if (tensor.mask != nullptr) {
    for (int64_t i = 0; i < count; ++i) parameter[i] = tensor.mask[at + i] != 0 ? parameter[i] : 0.0f;
  }
  if (tensor.average != nullptr) average_block(parameter, tensor, rule, at, count);
  put_parameter(parameter, tensor, rule, at, count, staged.random);
}

template <class Element>
void step_elements(const typename Element::Scalars& scalars, float* parameter, const float* gradient,
                   float* const* moments, int64_t count) {
  constexpr int kKept = Element::kMoments > 0 ? Element::kMoments : 1;
  float* places[kKept] = {};
  for (int k = 0; k < Element::kMoments; ++k) places[k] = moments[k];
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int64_t left = count - i;
    Vec held[kKept];
    BURNISH_UNROLL for (int k = 0; k < Element::kMoments; ++k) held[k] = load(places[k] + i, left);
    const Vec next = Element::step(scalars, load(parameter + i, left), load(gradient + i, left), held);
    store(parameter + i, next, left);
    BURNISH_UNROLL for (int k = 0; k < Element::kMoments; ++k) store(places[k] + i, held[k], left);
  }
}

template <class Element>
void step_block(const OptimizerTensor& tensor, const typename Element::Scalars& scalars, const OptimizerRule& rule,
                int64_t at, int64_t count, Staged& staged) {
  float* const parameter = take_parameter(tensor, rule, at, count, staged.parameter);
  const float* const gradient = take(tensor.gradient, tensor.gradient_format, at, count, staged.gradient);
  float* moments[kMostMoments] = {};
  take_moments<Element>(tensor, rule, at, count, staged, moments);
  step_elements<Element>(scalars, parameter, gradient, moments, count);
  put_moments<Element>(moments, tensor, rule, at, count, staged);
  finish_parameter(parameter, tensor, rule, at, count, staged);
}

// f(at, count) on the blocks [begin, end) of a tensor.
template <class F>
BURNISH_INLINE void each_block(const OptimizerTensor& tensor, int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin * kStateBlock; begin < end; ++begin, at += kStateBlock) {
    f(at, tensor.count - at < kStateBlock ? tensor.count - at : kStateBlock);
  }
}

template <class Element>
void step_blocks(const OptimizerTensor& tensor, const typename Element::Scalars& scalars, const OptimizerRule& rule,
                 int64_t begin, int64_t end) {
  Staged staged;
  each_block(tensor, begin, end,
             [&](int64_t at, int64_t count) { step_block<Element>(tensor, scalars, rule, at, count, staged); });
}

}  // namespace burnish::BURNISH_ISA
