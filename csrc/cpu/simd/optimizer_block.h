// Blocks of a parameter's step, for every optimizer. bf16 all through (pairs.h) and moments in codes (codes.h) have
// loops of their own. In every other mix of formats what is not fp32 is staged through buffers of a block that stay in
// the first-level cache, so that one loop over floats does the maths; fp32 is worked on where it lies. The maths is an
// element of math/<optimizer>.h.
#pragma once

#include "cpu/simd/codes.h"
#include "cpu/simd/level.h"
#include "cpu/simd/pairs.h"

namespace burnish::BURNISH_ISA {

struct alignas(64) Staged {
  float parameter[kStateBlock], gradient[kStateBlock], moments[kMostMoments][kStateBlock];
  uint32_t words[kBlockWords];  // of random bits, of the block at `drawn`
  int64_t drawn = -1;
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

// The random bits of the block at `at`.
inline const uint32_t* drawn_words(const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at,
                                   Staged& staged) {
  if (staged.drawn != at) draw(rule.seed, tensor.index, at, staged.words);
  staged.drawn = at;
  return staged.words;
}

// Back from `spare`, rounded by a stream of random bits.
inline void put_random(const float* spare, void* data, Format format, int64_t at, int64_t count, const uint32_t* words,
                       uint32_t stream) {
  if (format == Format::kBf16) return round_block(spare, static_cast<bf16*>(data) + at, count, words, stream);
  auto* const to = static_cast<fp16*>(data) + at;
  for (int64_t i = 0; i < count; ++i) to[i] = round_random<fp16>(spare[i], block_bits(words, stream, i));
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
                          int64_t count, Staged& staged) {
  if (rule.master == Master::kSplit) {
    (tensor.format == Format::kBf16 ? split_block<bf16> : split_block<fp16>)(values, tensor, at, count);
  } else if (rule.master == Master::kFloat && tensor.format == Format::kFloat) {
    memcpy(static_cast<float*>(tensor.parameter) + at, values, static_cast<size_t>(count) * sizeof(float));
  } else if (rule.master == Master::kNone && rule.random && tensor.format != Format::kFloat) {
    put_random(values, tensor.parameter, tensor.format, at, count, drawn_words(tensor, rule, at, staged), 1);
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

// Where the codes' scale of a kind is.
inline float* scale_of(const OptimizerTensor& tensor, int kind, int64_t at) {
  return tensor.scales + kind * ((tensor.count + kStateBlock - 1) / kStateBlock) + at / kStateBlock;
}

// The moments of a block as floats, in their place or staged.
template <class Element>
void take_moments(const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at, int64_t count, Staged& staged,
                  float** moments) {
  for (int k = 0; k < Element::kMoments; ++k) {
    moments[k] = rule.coded ? staged.moments[k] : take(tensor.moments[k], rule.moments, at, count, staged.moments[k]);
    if (!rule.coded) continue;
    const auto* codes = static_cast<const char*>(tensor.moments[k]) + at;
    const Vec scale(*scale_of(tensor, k, at));
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      store(moments[k] + i, decoded(codes + i, Element::signed_moment(k), scale, count - i), count - i);
    }
  }
}

template <class Element>
void put_moments(float* const* moments, const OptimizerTensor& tensor, const OptimizerRule& rule, int64_t at,
                 int64_t count, Staged& staged) {
  for (int k = 0; k < Element::kMoments; ++k) {
    if (rule.random && rule.moments == Format::kBf16) {
      const uint32_t* const words = drawn_words(tensor, rule, at, staged);
      put_random(moments[k], tensor.moments[k], rule.moments, at, count, words, static_cast<uint32_t>(2 + k));
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
  put_parameter(parameter, tensor, rule, at, count, staged);
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

// Whether the parameter is stepped and rounded to nearest, and nothing else is done to it.
inline bool is_plain(const OptimizerTensor& tensor, const OptimizerRule& rule) {
  return rule.master == Master::kNone && tensor.mask == nullptr && tensor.average == nullptr;
}

// The first pass over a block whose moments are codes.
template <class Element>
void step_coded_block(const OptimizerTensor& tensor, const typename Element::Scalars& scalars,
                      const OptimizerRule& rule, int64_t at, int64_t count, Staged& staged, Halfway<Element>& half) {
  float* scales[kMostMoments] = {};
  half.count = count;
  for (int k = 0; k < Element::kMoments; ++k) {
    half.codes[k] = static_cast<char*>(tensor.moments[k]) + at;
    scales[k] = scale_of(tensor, k, at);
  }
  const Place gradient = place_of(const_cast<void*>(tensor.gradient), tensor.gradient_format, at);
  if (is_plain(tensor, rule) && !(rule.random && tensor.format != Format::kFloat)) {
    return step_coded<Element>(scalars, place_of(tensor.parameter, tensor.format, at), gradient, scales, half);
  }
  float* const parameter = take_parameter(tensor, rule, at, count, staged.parameter);
  step_coded<Element>(scalars, {parameter, Format::kFloat}, gradient, scales, half);
  finish_parameter(parameter, tensor, rule, at, count, staged);
}

template <class Element>
void step_block(const OptimizerTensor& tensor, const typename Element::Scalars& scalars, const OptimizerRule& rule,
                int64_t at, int64_t count, Staged& staged) {
  const bool paired = tensor.format == Format::kBf16 && tensor.gradient_format == Format::kBf16 &&
                      (Element::kMoments == 0 || rule.moments == Format::kBf16);
  if (paired && is_plain(tensor, rule)) {
    bf16* moments[kMostMoments] = {};
    for (int k = 0; k < Element::kMoments; ++k) moments[k] = static_cast<bf16*>(tensor.moments[k]) + at;
    return step_pairs<Element>(scalars, static_cast<bf16*>(tensor.parameter) + at,
                               static_cast<const bf16*>(tensor.gradient) + at, moments, count,
                               rule.random ? drawn_words(tensor, rule, at, staged) : nullptr);
  }
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
  if (!rule.coded) {
    return each_block(tensor, begin, end, [&](int64_t at, int64_t count) {
      step_block<Element>(tensor, scalars, rule, at, count, staged);
    });
  }
  Halfway<Element> halves[2];
  int turn = 0;
  each_block(tensor, begin, end, [&](int64_t at, int64_t count) {
    step_coded_block<Element>(tensor, scalars, rule, at, count, staged, halves[turn]);
    turn = 1 - turn;
    encode(halves[turn]);  // the block before, if there is one
  });
  encode(halves[1 - turn]);
}

}  // namespace burnish::BURNISH_ISA
