// The codes of 8-bit moments: linear in the square root of the first, signed, and in the fourth root of the second. See
// python/burnish/moments.py for why.
#pragma once

#include "math/optimizer.h"

namespace burnish {

constexpr float kFirstLimit = 127.0f, kSecondLimit = 255.0f;
constexpr float kRootFloor = 0x1p-100f;  // keeps limit / largest finite

// The root that is coded; NaN for what cannot be.
template <class V>
BURNISH_HD V first_root(V moment) {
  return square_root(absolute(moment));
}
template <class V>
BURNISH_HD V second_root(V moment) {
  return square_root(square_root(moment));
}

struct CodeScale {
  float inverse;  // limit / largest root; 0 for a block that holds what is not finite
  float scale;    // largest root / limit; NaN for such a block
};

BURNISH_HD inline CodeScale code_scale(uint32_t largest_bits, float limit) {
  if (largest_bits >= 0x7f800000u) return {0.0f, bits_float(0x7fc00000u)};
  const float largest = at_least(bits_float(largest_bits), kRootFloor);
#ifdef __CUDA_ARCH__
  return {__fdiv_rn(limit, largest), __fdiv_rn(largest, limit)};
#else
  return {limit / largest, largest / limit};
#endif
}

// Half to even: 1.5 * 2^23 leaves a small integer in the low bits.
BURNISH_HD inline int32_t nearest(float value) {
  return static_cast<int32_t>(float_bits(value + 12582912.0f) - 0x4b400000u);
}

BURNISH_HD inline int8_t first_code(float moment, float root, float inverse) {
  const int32_t code = inverse == 0.0f ? 0 : nearest(root * inverse);
  return static_cast<int8_t>((float_bits(moment) >> 31) != 0 ? -code : code);
}

// What is not zero has a code that is not either: a second moment divides.
BURNISH_HD inline uint8_t second_code(float root, float inverse) {
  const int32_t code = inverse == 0.0f ? 0 : nearest(root * inverse);
  return static_cast<uint8_t>(root > 0.0f && inverse != 0.0f && code < 1 ? 1 : code);
}

BURNISH_HD inline float first_value(int8_t code, float scale) {
  const float root = static_cast<float>(code) * scale;
  return root * absolute(root);
}

BURNISH_HD inline float second_value(uint8_t code, float scale) {
  const float root = static_cast<float>(code) * scale, square = root * root;
  return square * square;
}

}  // namespace burnish
