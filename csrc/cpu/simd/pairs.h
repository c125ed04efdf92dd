// bf16 in pairs of neighbours, a word of memory each: the floats of the even elements and those of the odd ones are one
// instruction away, and so are the sixteen bits that round each, which a word of math/rounding.h holds likewise.
//
// No store of pairs looks for NaN: one that comes of bf16 by arithmetic is quiet and ends in sixteen zeros, of which no
// sixteen bits carry; quieted() makes such ones of any.
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

struct Bits {
  Ints even, odd;  // sixteen for each element of Pairs
};
BURNISH_INLINE Bits bits_of(Ints words) {
  return {_mm512_and_si512(words, spread(0xffff)), _mm512_srli_epi32(words, 16)};
}

// Of each float the upper half, after adding the bits that belong to it.
BURNISH_INLINE void store_pairs(bf16* p, Pairs values, Bits bits) {
  constexpr uint64_t kLowHalves = 0x3333333333333333;
  const Ints even = _mm512_add_epi32(_mm512_castps_si512(values.even.v), bits.even);
  const Ints odd = _mm512_add_epi32(_mm512_castps_si512(values.odd.v), bits.odd);
  const Ints down = _mm512_broadcast_i32x4(_mm_setr_epi32(0x0302, 0x0706, 0x0b0a, 0x0f0e));
  _mm512_storeu_si512(p, _mm512_mask_shuffle_epi8(odd, kLowHalves, even, down));
}

BURNISH_INLINE Vec quieted(Vec value) {
  constexpr int kOrAnd = 0xa8;  // (a | b) & c
  const __mmask16 nan = _mm512_cmp_ps_mask(value.v, value.v, _CMP_UNORD_Q);
  return Vec(_mm512_castsi512_ps(_mm512_mask_ternarylogic_epi32(_mm512_castps_si512(value.v), nan, spread(0x400000),
                                                                spread(0xffff0000u), kOrAnd)));
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
    return store_pairs(p, values, bits_of(nearest_words(values)));
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

BURNISH_INLINE Ints load_drawn(const uint32_t* p) { return _mm512_load_si512(p); }
BURNISH_INLINE void store_drawn(uint32_t* p, Ints words) { _mm512_store_si512(p, words); }
template <int kTurn>
BURNISH_INLINE Ints turned(Ints a) {
  return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(kTurn));
}
BURNISH_INLINE Ints low_quads(Ints a, Ints b) { return _mm512_unpacklo_epi64(a, b); }
BURNISH_INLINE Ints high_quads(Ints a, Ints b) { return _mm512_unpackhi_epi64(a, b); }

constexpr int kRows = 4;  // of the generator, side by side
BURNISH_INLINE Ints counted(uint32_t begin) {
  return _mm512_add_epi32(spread(begin), _mm512_setr_epi32(0, 0, 4, 0, 1, 0, 5, 0, 2, 0, 6, 0, 3, 0, 7, 0));
}

#elif defined(__AVX2__)

BURNISH_INLINE Pairs load_pairs(const bf16* p) {
  const Ints words = _mm256_loadu_si256(reinterpret_cast<const Ints*>(p));
  return {Vec(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))),
          Vec(_mm256_castsi256_ps(_mm256_and_si256(words, spread(0xffff0000u))))};
}

struct Bits {
  Ints even, odd;  // sixteen for each element of Pairs
};
BURNISH_INLINE Bits bits_of(Ints words) {
  return {_mm256_and_si256(words, spread(0xffff)), _mm256_srli_epi32(words, 16)};
}

// Of each float the upper half, after adding the bits that belong to it.
BURNISH_INLINE void store_pairs(bf16* p, Pairs values, Bits bits) {
  constexpr int kOdd = 0xaa;
  const Ints even = _mm256_add_epi32(_mm256_castps_si256(values.even.v), bits.even);
  const Ints odd = _mm256_add_epi32(_mm256_castps_si256(values.odd.v), bits.odd);
  _mm256_storeu_si256(reinterpret_cast<Ints*>(p), _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, kOdd));
}

BURNISH_INLINE Vec quieted(Vec value) {
  const __m256 quiet = _mm256_or_ps(value.v, _mm256_castsi256_ps(spread(0x400000)));
  const __m256 kept = _mm256_and_ps(quiet, _mm256_castsi256_ps(spread(0xffff0000u)));
  return Vec(_mm256_blendv_ps(value.v, kept, _mm256_cmp_ps(value.v, value.v, _CMP_UNORD_Q)));
}

// To nearest even.
BURNISH_INLINE void store_pairs(bf16* p, Pairs values) {
  constexpr int kOdd = 0xaa;
  const Ints even = _mm256_srli_epi32(_mm256_castps_si256(values.even.v), 16);
  const Ints kept = _mm256_blend_epi16(even, _mm256_castps_si256(values.odd.v), kOdd);
  store_pairs(p, values, bits_of(_mm256_add_epi16(_mm256_and_si256(kept, spread(0x10001)), spread(0x7fff7fff))));
}

BURNISH_INLINE Pairs load_pairs(const float* p) {
  const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
  const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  return {Vec(_mm256_shuffle_ps(low, high, 0x88)), Vec(_mm256_shuffle_ps(low, high, 0xdd))};
}

BURNISH_INLINE Ints load_drawn(const uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const Ints*>(p)); }
BURNISH_INLINE void store_drawn(uint32_t* p, Ints words) { _mm256_store_si256(reinterpret_cast<Ints*>(p), words); }
template <int kTurn>
BURNISH_INLINE Ints turned(Ints a) {
  return _mm256_shuffle_epi32(a, kTurn);
}
BURNISH_INLINE Ints low_quads(Ints a, Ints b) { return _mm256_unpacklo_epi64(a, b); }
BURNISH_INLINE Ints high_quads(Ints a, Ints b) { return _mm256_unpackhi_epi64(a, b); }

constexpr int kRows = 2;  // of the generator, side by side
BURNISH_INLINE Ints counted(uint32_t begin) {
  return _mm256_add_epi32(spread(begin), _mm256_setr_epi32(0, 0, 2, 0, 1, 0, 3, 0));
}

#else

template <class T>
Pairs load_pairs(const T* p) {
  return {Vec(to_float(p[0])), Vec(to_float(p[1]))};
}
struct Bits {
  uint32_t even, odd;  // sixteen for each element of Pairs
};
inline void store_pairs(bf16* p, Pairs values, Bits bits) {
  p[0] = round_random<bf16>(values.even.v, bits.even);
  p[1] = round_random<bf16>(values.odd.v, bits.odd);
}
inline void store_pairs(bf16* p, Pairs values) {
  p[0] = from_float<bf16>(values.even.v);
  p[1] = from_float<bf16>(values.odd.v);
}
inline Vec quieted(Vec value) { return value; }

#endif

#if defined(__AVX2__)

// A stream's bits for the elements of the words from i on.
BURNISH_INLINE Bits stream_bits(const uint32_t* words, int64_t i, uint32_t stream) {
  const Bits own = bits_of(load_drawn(words + i));
  switch (stream) {
    case 1:
      return own;
    case 2:
      return {turned<0x39>(own.even), turned<0x39>(own.odd)};
    case 3:
      return {turned<0x4e>(own.even), turned<0x4e>(own.odd)};
    default:
      return {turned<0x93>(own.even), turned<0x93>(own.odd)};
  }
}

// The words of the block of a tensor that begins at element `at`.
inline void draw(uint64_t seed, uint32_t tensor, int64_t at, uint32_t* words) {
  constexpr int kGroups = static_cast<int>(kStateBlock / kRoundingGroup), kCalls = Vec::kLanes / 2;  // calls of a row
  const auto begin = static_cast<uint64_t>(at / kRoundingGroup);
  for (int g = 0; g < kGroups; g += kRows * kCalls) {
    Ints w[kRows][4];
    BURNISH_UNROLL for (int r = 0; r < kRows; ++r) {
      // a block's groups share the high word of their count: 2^32 is a multiple of a block's
      w[r][0] = counted(static_cast<uint32_t>(begin) + static_cast<uint32_t>(g + r * kCalls));
      w[r][1] = spread(static_cast<uint32_t>(begin >> 32));
      w[r][2] = spread(tensor);
      w[r][3] = spread(1);
    }
    philox_even<kRoundingRounds>(w, seed);
    BURNISH_UNROLL for (int r = 0; r < kRows; ++r) {
      // call 2 t counts group t of the row, call 2 t + 1 the one half a row later: so the groups come out in order
      uint32_t* const to = words + (g + r * kCalls) * kGroupWords;
      const Ints first = woven(w[r][0], w[r][1]), last = woven(w[r][2], w[r][3]);
      store_drawn(to, low_quads(first, last));
      store_drawn(to + Vec::kLanes, high_quads(first, last));
    }
  }
}

#else

inline Bits stream_bits(const uint32_t* words, int64_t i, uint32_t stream) {
  const uint32_t word = words[i / kGroupWords * kGroupWords + (i + stream - 1) % kGroupWords];
  return {word & 0xffffu, word >> 16};
}

inline void draw(uint64_t seed, uint32_t tensor, int64_t at, uint32_t* words) {
  const auto begin = static_cast<uint64_t>(at / kRoundingGroup);
  for (int64_t i = 0; i < kBlockWords; i += kGroupWords) {
    const Philox drawn = rounding_words(seed, tensor, begin + static_cast<uint64_t>(i / kGroupWords));
    memcpy(words + i, drawn.word, sizeof drawn.word);
  }
}

#endif

// `count` floats rounded to bf16 by a stream's bits.
inline void round_block(const float* from, bf16* to, int64_t count, const uint32_t* words, uint32_t stream) {
  int64_t i = 0;
  for (; i + kPaired <= count; i += kPaired) {
    const Pairs values = load_pairs(from + i);
    store_pairs(to + i, {quieted(values.even), quieted(values.odd)}, stream_bits(words, i / 2, stream));
  }
  for (; i < count; ++i) to[i] = round_random<bf16>(from[i], block_bits(words, stream, i));
}

// A step of bf16 all through, of at most a block; rounds to nearest where there are no words. The scalars are its own,
// so that stores cannot change them and they stay in registers.
template <class Element>
void step_pairs(const typename Element::Scalars scalars, bf16* parameter, const bf16* gradient, bf16* const* moments,
                int64_t count, const uint32_t* words) {
  constexpr int kKinds = Element::kMoments, kKept = kKinds > 0 ? kKinds : 1, kStored = 1 + kKinds;
  bf16* places[kKept] = {};
  for (int k = 0; k < kKinds; ++k) places[k] = moments[k];
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
    if (words == nullptr) {
      BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) store_pairs(m[k], {even[k], odd[k]});
      return store_pairs(p, next);
    }
    // all bits before the first store, of which the compiler cannot know that it leaves the words alone
    Bits bits[kStored];
    BURNISH_UNROLL for (int k = 0; k < kStored; ++k) bits[k] = stream_bits(words, i / 2, static_cast<uint32_t>(1 + k));
    BURNISH_UNROLL for (int k = 0; k < kKinds; ++k) store_pairs(m[k], {even[k], odd[k]}, bits[1 + k]);
    store_pairs(p, next, bits[0]);
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
