// What every header of math/ needs: the host-device marker and bit casts. No torch, no CUDA headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BURNISH_HD __host__ __device__
#else
#define BURNISH_HD
#endif

namespace burnish {

BURNISH_HD inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BURNISH_HD inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace burnish
