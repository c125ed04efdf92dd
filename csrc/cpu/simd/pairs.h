// bf16 in pairs of neighbours, a word of memory each: the floats of the even elements and those of the odd ones are one
// instruction away, and so are the sixteen bits that round each, which a word of math/rounding.h holds likewise.
#pragma once

#include "cpu/simd/philox.h"
#include "math/rounding.h"
#include "optimizer.h"

namespace burnish::BURNISH_ISA {

struct Pairs {
  Vec even, odd;
};
constexpr int kPaired = 2 * Vec::kLanes;          // elements of Pairs
constexpr int64_t kBlockWords = kStateBlock / 2;  // of random bits
constexpr int64_t kGroupWords = kRoundingGroup / 2;

// Sixteen bits for element i of the block of `words`.
BURNISH_INLINE uint32_t block_bits(const uint32_t* words, uint32_t stream, int64_t i) {
  const uint32_t* const group = words + i / kRoundingGroup * kGroupWords;
  return random_bits({{group[0], group[1], group[2], group[3]}}, stream, static_cast<int>(i % kRoundingGroup));
}

#if defined(__AVX512F__)

BURNISH_INLINE Pairs load_pairs(const bf16* p) {
  const Ints words = _mm512_loadu_si512(p);
  return {Vec(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))),
          Vec(_mm512_castsi512_ps(_mm512_and_si512(words, spread(0xffff0000u))))};
}

// Of each float the upper half, after adding the bits that belong to it.
BURNISH_INLINE void store_pairs(bf16* p, Pairs values, Ints words) {
  const Ints even = _mm512_castps_si512(values.even.v), odd = _mm512_castps_si512(values.odd.v);
  Ints low = _mm512_add_epi32(even, _mm512_and_si512(words, spread(0xffff)));
  Ints high = _mm512_add_epi32(odd, _mm512_srli_epi32(words, 16));
  if (_mm512_cmp_ps_mask(values.even.v, values.odd.v, _CMP_UNORD_Q) != 0) [[unlikely]] {
    const __mmask16 even_nan = _mm512_cmp_ps_mask(values.even.v, values.even.v, _CMP_UNORD_Q);
    const __mmask16 odd_nan = _mm512_cmp_ps_mask(values.odd.v, values.odd.v, _CMP_UNORD_Q);
    low = _mm512_mask_or_epi32(low, even_nan, even, spread(0x400000));
    high = _mm512_mask_or_epi32(high, odd_nan, odd, spread(0x400000));
  }
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high));
}

// The words that round to nearest even.
BURNISH_INLINE Ints nearest_words(Pairs values) {
  const Ints even = _mm512_srli_epi32(_mm512_castps_si512(values.even.v), 16);
  const Ints kept = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_castps_si512(values.odd.v));
  return _mm512_add_epi16(_mm512_and_si512(kept, spread(0x10001)), spread(0x7fff7fff));
}

BURNISH_INLINE void store_pairs(bf16* p, Pairs values) {
  constexpr int kSubnormal = 0x20;
  const __mmask16 even = _mm512_fpclass_ps_mask(values.even.v, kSubnormal);
  const __mmask16 odd = _mm512_fpclass_ps_mask(values.odd.v, kSubnormal);
  // the instruction would flush subnormal numbers
  if (!_kortestz_mask16_u8(even, odd)) [[unlikely]]
    return store_pairs(p, values, nearest_words(values));
  const __m512bh rounded = _mm512_cvtne2ps_pbh(values.odd.v, values.even.v);
  Ints halves;
  memcpy(&halves, &rounded, sizeof halves);
  const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Ints order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, spread(16)), 16));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
}

BURNISH_INLINE Pairs load_pairs(const float* p) {
  const Ints low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 16);
  const Ints even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Ints odd = _mm512_add_epi32(even, spread(1));
  return {Vec(_mm512_castsi512_ps(_mm512_permutex2var_epi32(low, even, high))),
          Vec(_mm512_castsi512_ps(_mm512_permutex2var_epi32(low, odd, high)))};
}

// The words at `words`, in the order of a stream.
BURNISH_INLINE Ints stream_words(const uint32_t* words, int64_t i, uint32_t stream) {
  const Ints own = _mm512_load_si512(words + i);
  switch (stream) {
    case 1:
      return own;
    case 2:
      return _mm512_shuffle_epi32(own, static_cast<_MM_PERM_ENUM>(0x39));
    case 3:
      return _mm512_shuffle_epi32(own, static_cast<_MM_PERM_ENUM>(0x4e));
    default:
      return _mm512_shuffle_epi32(own, static_cast<_MM_PERM_ENUM>(0x93));
  }
}

#elif defined(__AVX2__)

BURNISH_INLINE Pairs load_pairs(const bf16* p) {
  const Ints words = _mm256_loadu_si256(reinterpret_cast<const Ints*>(p));
  return {Vec(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))),
          Vec(_mm256_castsi256_ps(_mm256_and_si256(words, spread(0xffff0000u))))};
}

// Of each float the upper half, after adding the bits that belong to it.
BURNISH_INLINE void store_pairs(bf16* p, Pairs values, Ints words) {
  const auto rounded = [](Vec value, Ints bits) __attribute__((always_inline)) {
    const __m256 quiet = _mm256_or_ps(value.v, _mm256_castsi256_ps(spread(0x400000)));
    const __m256 sum = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value.v), bits));
    return _mm256_castps_si256(_mm256_blendv_ps(sum, quiet, _mm256_cmp_ps(value.v, value.v, _CMP_UNORD_Q)));
  };
  const Ints low = rounded(values.even, _mm256_and_si256(words, spread(0xffff)));
  const Ints high = rounded(values.odd, _mm256_srli_epi32(words, 16));
  constexpr int kOdd = 0xaa;
  _mm256_storeu_si256(reinterpret_cast<Ints*>(p), _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, kOdd));
}

// To nearest even.
BURNISH_INLINE void store_pairs(bf16* p, Pairs values) {
  constexpr int kOdd = 0xaa;
  const Ints even = _mm256_srli_epi32(_mm256_castps_si256(values.even.v), 16);
  const Ints kept = _mm256_blend_epi16(even, _mm256_castps_si256(values.odd.v), kOdd);
  store_pairs(p, values, _mm256_add_epi16(_mm256_and_si256(kept, spread(0x10001)), spread(0x7fff7fff)));
}

BURNISH_INLINE Pairs load_pairs(const float* p) {
  const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
  const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  return {Vec(_mm256_shuffle_ps(low, high, 0x88)), Vec(_mm256_shuffle_ps(low, high, 0xdd))};
}

// The words at `words`, in the order of a stream.
BURNISH_INLINE Ints stream_words(const uint32_t* words, int64_t i, uint32_t stream) {
  const Ints own = _mm256_load_si256(reinterpret_cast<const Ints*>(words + i));
  switch (stream) {
    case 1:
      return own;
    case 2:
      return _mm256_shuffle_epi32(own, 0x39);
    case 3:
      return _mm256_shuffle_epi32(own, 0x4e);
    default:
      return _mm256_shuffle_epi32(own, 0x93);
  }
}

#else

template <class T>
Pairs load_pairs(const T* p) {
  return {Vec(to_float(p[0])), Vec(to_float(p[1]))};
}
inline void store_pairs(bf16* p, Pairs values, uint32_t word) {
  p[0] = round_random<bf16>(values.even.v, word & 0xffffu);
  p[1] = round_random<bf16>(values.odd.v, word >> 16);
}
inline void store_pairs(bf16* p, Pairs values) {
  p[0] = from_float<bf16>(values.even.v);
  p[1] = from_float<bf16>(values.odd.v);
}
inline uint32_t stream_words(const uint32_t* words, int64_t i, uint32_t stream) {
  return words[i / kGroupWords * kGroupWords + (i + stream - 1) % kGroupWords];
}

#endif

// The words of the block of a tensor that begins at element `at`.
inline void draw(uint64_t seed, uint32_t tensor, int64_t at, uint32_t* words) {
  constexpr int kGroups = static_cast<int>(kStateBlock / kRoundingGroup);
  const auto begin = static_cast<uint64_t>(at / kRoundingGroup);
  // lane 4 j + t (of 8 lanes, 2 j + t) counts group 4 t + j, so that transposing fours of words leaves the groups in
  // order; a block's groups share the high word of their count: 2^32 is a multiple of a block's
#if defined(__AVX512F__)
  constexpr int kRows = kGroups / Vec::kLanes;
  const Ints lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Ints w[kRows][4];
  BURNISH_UNROLL for (int r = 0; r < kRows; ++r) {
    w[r][0] = _mm512_add_epi32(spread(static_cast<uint32_t>(begin) + Vec::kLanes * r), lanes);
    w[r][1] = spread(static_cast<uint32_t>(begin >> 32));
    w[r][2] = spread(tensor);
    w[r][3] = spread(1);
  }
  philox_lanes<kRoundingRounds>(w, seed);
  BURNISH_UNROLL for (int r = 0; r < kRows; ++r) {
    uint32_t* const to = words + r * 4 * Vec::kLanes;
    const Ints a = _mm512_unpacklo_epi32(w[r][0], w[r][1]), b = _mm512_unpackhi_epi32(w[r][0], w[r][1]);
    const Ints c = _mm512_unpacklo_epi32(w[r][2], w[r][3]), d = _mm512_unpackhi_epi32(w[r][2], w[r][3]);
    _mm512_store_si512(to, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(to + 16, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(to + 32, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(to + 48, _mm512_unpackhi_epi64(b, d));
  }
#elif defined(__AVX2__)
  const Ints lanes = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int g = 0; g < kGroups; g += Vec::kLanes) {
    Ints w[1][4] = {{_mm256_add_epi32(spread(static_cast<uint32_t>(begin) + static_cast<uint32_t>(g)), lanes),
                     spread(static_cast<uint32_t>(begin >> 32)), spread(tensor), spread(1)}};
    philox_lanes<kRoundingRounds>(w, seed);
    const Ints a = _mm256_unpacklo_epi32(w[0][0], w[0][1]), b = _mm256_unpackhi_epi32(w[0][0], w[0][1]);
    const Ints c = _mm256_unpacklo_epi32(w[0][2], w[0][3]), d = _mm256_unpackhi_epi32(w[0][2], w[0][3]);
    auto* const to = reinterpret_cast<Ints*>(words + g * kGroupWords);
    _mm256_store_si256(to, _mm256_unpacklo_epi64(a, c));
    _mm256_store_si256(to + 1, _mm256_unpackhi_epi64(a, c));
    _mm256_store_si256(to + 2, _mm256_unpacklo_epi64(b, d));
    _mm256_store_si256(to + 3, _mm256_unpackhi_epi64(b, d));
  }
#else
  for (int g = 0; g < kGroups; ++g) {
    const Philox drawn = rounding_words(seed, tensor, begin + static_cast<uint64_t>(g));
    memcpy(words + g * kGroupWords, drawn.word, sizeof drawn.word);
  }
#endif
}

// `count` floats rounded to bf16 by a stream's bits.
inline void round_block(const float* from, bf16* to, int64_t count, const uint32_t* words, uint32_t stream) {
  int64_t i = 0;
  for (; i + kPaired <= count; i += kPaired) {
    store_pairs(to + i, load_pairs(from + i), stream_words(words, i / 2, stream));
  }
  for (; i < count; ++i) to[i] = round_random<bf16>(from[i], block_bits(words, stream, i));
}

// A step of bf16 all through, of at most a block; rounds to nearest where there are no words. The scalars are its own,
// so that stores cannot change them and they stay in registers.
template <class Element>
void step_pairs(const typename Element::Scalars scalars, bf16* parameter, const bf16* gradient, bf16* const* moments,
                int64_t count, const uint32_t* words) {
  constexpr int kKinds = Element::kMoments, kKept = kKinds > 0 ? kKinds : 1;
  bf16* places[kKept] = {};
  for (int k = 0; k < kKinds; ++k) places[k] = moments[k];
  const auto store_rounded = [words](bf16* to, Pairs values, int64_t i, uint32_t stream)
                                 __attribute__((always_inline)) {
                                   if (words == nullptr) return store_pairs(to, values);
                                   store_pairs(to, values, stream_words(words, i / 2, stream));
                                 };
  const auto step = [&](int64_t i, bf16* p, const bf16* g, bf16* const* m) __attribute__((always_inline)) {
    const Pairs before = load_pairs(p), slope = load_pairs(g);
    Vec even[kKept], odd[kKept];
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
      const Pairs held = load_pairs(m[k]);
      even[k] = held.even;
      odd[k] = held.odd;
    }
    const Pairs next = {Element::step(scalars, before.even, slope.even, even),
                        Element::step(scalars, before.odd, slope.odd, odd)};
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) {
      store_rounded(m[k], {even[k], odd[k]}, i, static_cast<uint32_t>(2 + k));
    }
    store_rounded(p, next, i, 1);
  };
  int64_t i = 0;
  for (; i + kPaired <= count; i += kPaired) {
    bf16* at[kKept] = {};
    for (int k = 0; k < kKinds; ++k) at[k] = places[k] + i;
    step(i, parameter + i, gradient + i, at);
  }
  if (i == count) return;
  const auto bytes = static_cast<size_t>(count - i) * sizeof(bf16);
  bf16 rest[2 + kKept][kPaired] = {};
  bf16* at[kKept] = {};
  memcpy(rest[0], parameter + i, bytes);
  memcpy(rest[1], gradient + i, bytes);
  for (int k = 0; k < kKinds; ++k) memcpy(at[k] = rest[2 + k], places[k] + i, bytes);
  step(i, rest[0], rest[1], at);
  memcpy(parameter + i, rest[0], bytes);
  for (int k = 0; k < kKinds; ++k) memcpy(places[k] + i, rest[2 + k], bytes);
}

}  // namespace burnish::BURNISH_ISA
