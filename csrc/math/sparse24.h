// The metadata of 2:4 weights: see burnish/sparse24_format.py.
#pragma once

#include "math/base.h"

namespace burnish {

constexpr int64_t kGroup24 = 4;  // elements of a row of which two are stored
constexpr int64_t kStep24 = 8;   // elements that a byte of metadata describes

// Which of 8 elements are stored, a bit each, for a byte of metadata.
BURNISH_HD constexpr uint8_t stored_bits(uint8_t metadata) {
  const uint32_t m = metadata;
  return static_cast<uint8_t>(1u << (m & 3) | 1u << (m >> 2 & 3) | 16u << (m >> 4 & 3) | 16u << (m >> 6));
}

}  // namespace burnish
