// Checks of a bitmap weight that its kernels make while they read it.
#pragma once

#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {

// Whether rows [n, n + count) may be read: their starts ascend and lie in the values.
inline bool in_order(const BitmapWeight& weight, int64_t n, int64_t count) {
  bool ordered = weight.starts[n] >= 0;
  for (int64_t i = 0; i < count; ++i) ordered = ordered && weight.starts[n + i] <= weight.starts[n + i + 1];
  return ordered && weight.starts[n + count] <= weight.count;
}

// Whether a row of the bitmap has bits beyond `width` columns.
inline bool beyond(const uint8_t* bits, int64_t row_bytes, int64_t width) {
  if (width == row_bytes * 8) return false;
  uint64_t last;
  memcpy(&last, bits + row_bytes - 8, 8);
  return last >> (width - (row_bytes - 8) * 8) != 0;
}

}  // namespace burnish::BURNISH_ISA
