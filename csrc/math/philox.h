// Dropout without a stored mask: Philox4x32-10 (Salmon et al. 2011), keyed by a seed, counted by where an element is.
// python/burnish/dropout.py says which bits decide which element.
#pragma once

#include "math/base.h"

namespace burnish {

constexpr int kDropoutRounds = 10;         // of the generator
constexpr int kDropoutGroup = 8;           // elements of a row that one call of the generator decides
constexpr uint32_t kDropoutRange = 65536;  // values of the 16-bit word that decides an element

struct Philox {
  uint32_t word[4];
};

BURNISH_HD inline uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

template <int kRounds = kDropoutRounds>
BURNISH_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t first_high = high_product(0xd2511f53u, c0), first = 0xd2511f53u * c0;
    const uint32_t second_high = high_product(0xcd9e8d57u, c2), second = 0xcd9e8d57u * c2;
    c0 = second_high ^ c1 ^ k0;
    c1 = second;
    c2 = first_high ^ c3 ^ k1;
    c3 = first;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words that decide elements [8 group, 8 group + 8) of a row.
BURNISH_HD inline Philox dropout_words(uint64_t seed, int64_t row, int64_t group) {
  const uint64_t r = static_cast<uint64_t>(row);
  return philox(static_cast<uint32_t>(group), static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), 0, seed);
}

// Bit i: whether element i of the group is kept. threshold in [0, 65536]: of 65536 values, how many drop an element.
BURNISH_HD inline uint32_t kept_bits(const Philox& words, uint32_t threshold) {
  uint32_t bits = 0;
  for (int i = 0; i < kDropoutGroup; ++i) {
    bits |= static_cast<uint32_t>((words.word[i / 2] >> 16 * (i % 2) & 0xffffu) >= threshold) << i;
  }
  return bits;
}

BURNISH_HD inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 65536 + 0.5); }

// 1 / (the probability that an element is kept), 0 where none is.
BURNISH_HD inline double dropout_factor(uint32_t threshold) {
  return threshold == kDropoutRange ? 0.0 : 65536.0 / (65536.0 - threshold);
}

}  // namespace burnish
