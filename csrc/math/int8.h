// The rule that turns a row of floats into int8: see burnish/ops/int8_quantize_rows.py for it in words.
#pragma once

#include "math/base.h"

namespace burnish {

// |x| as its bit pattern: integers that order as magnitudes do, with NaN above infinity, so that an integer maximum is
// an absolute maximum which keeps NaN.
BURNISH_HD inline uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kAmaxFloorBits = (127u - 100u) << 23;  // 2^-100 keeps 127 / amax finite

struct RowScale {
  float amax;
  float inverse;  // 127 / amax: 0 for an infinite row
  float scale;    // amax / 127
};

// From the maximum of magnitude_bits over a row. Divisions are IEEE, also on a GPU.
BURNISH_HD inline RowScale row_scale(uint32_t largest) {
  const float amax = bits_float(largest < kAmaxFloorBits ? kAmaxFloorBits : largest);
#ifdef __CUDA_ARCH__
  return {amax, __fdiv_rn(127.0f, amax), __fdiv_rn(amax, 127.0f)};
#else
  return {amax, 127.0f / amax, amax / 127.0f};
#endif
}

// Round half to even, in [-127, 127]: +-127 at infinities, 0 in a row whose amax is NaN.
BURNISH_HD inline int32_t quantize(float x, float amax, float inverse) {
  if (amax != amax) return 0;
  if (magnitude_bits(x) == kInfinityBits) return x > 0 ? 127 : -127;
#ifdef __CUDA_ARCH__
  return __float2int_rn(__fmul_rn(x, inverse));
#else
  return static_cast<int32_t>(std::nearbyint(x * inverse));
#endif
}

}  // namespace burnish
