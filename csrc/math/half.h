// The 16-bit floats as bit types, converted by integer arithmetic: the same bits on every compiler and device.
#pragma once

#include "math/base.h"

namespace burnish {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

BURNISH_HD inline float to_float(float value) { return value; }

BURNISH_HD inline float to_float(bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

BURNISH_HD inline float to_float(fp16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | 0x70000000u | magnitude);  // Inf, NaN
  // fp16's exponent bias is 15, fp32's 127: the product rescales normal and subnormal numbers alike, exactly
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

template <class T>
BURNISH_HD T from_float(float value);

template <>
BURNISH_HD inline float from_float<float>(float value) {
  return value;
}

// Round to nearest even; a NaN stays one, quiet.
template <>
BURNISH_HD inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Round to nearest even, to infinity from 65520 on; a NaN stays one, quiet.
template <>
BURNISH_HD inline fp16 from_float<fp16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // subnormal result: adding 0.5 shifts the mantissa to where the hardware rounds it
    return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace burnish
