// Stochastic rounding to 16-bit floats, and floats kept as 16 + 8 bits: integer arithmetic, the same bits everywhere.
// python/burnish/rounding.py says both in words.
#pragma once

#include "math/half.h"
#include "math/philox.h"

namespace burnish {

constexpr int kRoundingGroup = 8;   // elements that one call of the generator decides, in up to four streams
constexpr int kRoundingRounds = 7;  // of the generator: the fewest that pass its authors' tests

// The words for elements [8 group, 8 group + 8) of a tensor. The last count tells them from dropout's.
BURNISH_HD inline Philox rounding_words(uint64_t seed, uint32_t tensor, uint64_t group) {
  return philox<kRoundingRounds>(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), tensor, 1, seed);
}

// Sixteen bits for element i of the group; `stream`, from 1 to 4, tells their uses apart.
BURNISH_HD inline uint32_t random_bits(const Philox& words, uint32_t stream, int i) {
  return words.word[(static_cast<uint32_t>(i / 2) + stream - 1) % 4] >> 16 * (i % 2) & 0xffffu;
}

// Up with the probability of how far the value is from the neighbour below; `random` in [0, 65536).
template <class T>
BURNISH_HD T round_random(float value, uint32_t random);

template <>
BURNISH_HD inline bf16 round_random<bf16>(float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>((nan ? bits | 0x400000u : bits + random) >> 16)};
}

template <>
BURNISH_HD inline fp16 round_random<fp16>(float value, uint32_t random) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude >= 0x47800000u) {
    rounded = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    rounded = (magnitude - 0x38000000u + (random & 0x1fffu)) >> 13;
  } else {
    const float units = bits_float(magnitude) * 0x1p24f;  // exact, below 2^10
    const auto whole = static_cast<uint32_t>(static_cast<int32_t>(units));
    rounded = whole + ((units - static_cast<float>(whole)) * 65536.0f > static_cast<float>(random));
  }
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rounded)};
}

// A float of 24 bits: the nearest 16-bit float and what it lacks, in 256ths of its last place.
struct Split {
  uint16_t high;
  uint8_t low;  // two's complement
};

BURNISH_HD inline Split split_magnitude(uint32_t sign, uint32_t magnitude) {
  const uint32_t high = (magnitude + 128u) >> 8;
  return {static_cast<uint16_t>(sign | high), static_cast<uint8_t>(magnitude - (high << 8))};
}

template <class T>
BURNISH_HD uint32_t magnitude24(float value);

template <>
BURNISH_HD inline uint32_t magnitude24<bf16>(float value) {
  const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
  return magnitude > 0x7f800000u ? 0x7fc000u : (magnitude + 0x7fu + (magnitude >> 8 & 1u)) >> 8;
}

template <>
BURNISH_HD inline uint32_t magnitude24<fp16>(float value) {
  const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return magnitude > 0x7f800000u ? 0x7e0000u : 0x7c0000u;
  // adding 2^-9 shifts a subnormal's mantissa to where the hardware rounds it
  if (magnitude < 0x38800000u) return float_bits(bits_float(magnitude) + 0x1p-9f) - 0x3b000000u;
  return (magnitude - 0x38000000u + 0xfu + (magnitude >> 5 & 1u)) >> 5;
}

template <class T>
BURNISH_HD Split split(float value) {
  return split_magnitude(float_bits(value) >> 16 & 0x8000u, magnitude24<T>(value));
}

BURNISH_HD inline uint32_t joined_magnitude(uint16_t high, uint8_t low) {
  return ((static_cast<uint32_t>(high & 0x7fffu) << 8) + static_cast<uint32_t>(static_cast<int8_t>(low))) & 0x7fffffu;
}

BURNISH_HD inline float join(bf16 high, uint8_t low) {
  return bits_float(static_cast<uint32_t>(high.bits & 0x8000u) << 16 | joined_magnitude(high.bits, low) << 8);
}

BURNISH_HD inline float join(fp16 high, uint8_t low) {
  const uint32_t sign = static_cast<uint32_t>(high.bits & 0x8000u) << 16;
  const uint32_t magnitude = joined_magnitude(high.bits, low) << 5;
  const float finite = bits_float(magnitude) * 0x1p112f;
  return bits_float(sign | (magnitude >= 0x0f800000u ? 0x70000000u | magnitude : float_bits(finite)));
}

}  // namespace burnish
