// Where an int8 weight's elements lie in the vnni layout: see burnish/ops/int8_linear_pack.py.
#pragma once

#include "math/base.h"

namespace burnish {

constexpr int64_t kPanel = 64;       // output channels of a panel
constexpr int64_t kGroup = 16;       // the last panel is a multiple of this wide
constexpr int64_t kDepth = 4;        // consecutive k of one channel
constexpr int64_t kRowPadding = 16;  // bytes that a row of the rows layout is a multiple of

BURNISH_HD inline int64_t ceil_div(int64_t size, int64_t part) { return (size + part - 1) / part; }

BURNISH_HD inline int64_t round_up(int64_t size, int64_t multiple) { return ceil_div(size, multiple) * multiple; }

// Channels of panel p: 64, but for the last one what is left, rounded up.
BURNISH_HD inline int64_t panel_width(int64_t channels, int64_t p) {
  const int64_t left = round_up(channels, kGroup) - p * kPanel;
  return left < kPanel ? left : kPanel;
}

// Byte of weight [n, k] in a packed buffer of `channels` x `width`.
BURNISH_HD inline int64_t vnni_offset(int64_t channels, int64_t width, int64_t n, int64_t k) {
  const int64_t padded = round_up(width, kDepth);
  const int64_t p = n / kPanel;
  return p * kPanel * padded + (k / kDepth * panel_width(channels, p) + n % kPanel) * kDepth + k % kDepth;
}

}  // namespace burnish
