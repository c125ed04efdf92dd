// What the kernels share that stream a dense weight past a few rows of x: products from a ring's 16-byte units, for the
// tiles of gather.cuh. A unit is 16 bytes of one row; four of them side by side, 64 bytes, are the depth of one step.
#pragma once

#include <type_traits>

#include "cuda/format.cuh"
#include "cuda/gather.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {

// sum[channel tile][row tile] += weight * x over a step, laid out as mma lays out its result. weight(i, row, column)
// is the unit at `column` of channel 8 i + row, x(i, row, column) that of row 8 i + row. The tensor core's types ask
// only for the lane's own units, row lane / 4 and column lane % 4: they are four words of k each, and because the order
// of k in a fragment is free, words 0, 1 make one product and 2, 3 another.
template <class Element, class Sum, int kChannelTiles, int kRowTiles, class Weight, class X>
__device__ inline void multiply(Sum (&sum)[kChannelTiles][kRowTiles][4], const Weight& weight, const X& x) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  if constexpr (!std::is_same_v<Element, float>) {
    Bytes16 b[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) b[i] = x(i, g, t);
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      const Bytes16 low = weight(2 * j, g, t), high = weight(2 * j + 1, g, t);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma<Element>(sum[j][i], {low.word[0], high.word[0], low.word[1], high.word[1]}, {b[i].word[0], b[i].word[1]});
        mma<Element>(sum[j][i], {low.word[2], high.word[2], low.word[3], high.word[3]}, {b[i].word[2], b[i].word[3]});
      }
    }
  } else {
    // eight row tiles fill the registers: their columns one after the other
#pragma unroll(kRowTiles < 8 ? 4 : 1)
    for (int c = 0; c < 4; ++c) {
      const int column = (c + t) % 4;  // the four rows of x that a warp reads are then in different banks
      Bytes16 w[2 * kChannelTiles];
#pragma unroll
      for (int j = 0; j < 2 * kChannelTiles; ++j) w[j] = weight(j, g, column);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const Bytes16 even = x(i, 2 * t, column), odd = x(i, 2 * t + 1, column);
#pragma unroll
        for (int j = 0; j < 2 * kChannelTiles; ++j) {
          float* both = sum[j / 2][i] + j % 2 * 2;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            both[0] = fmaf(bits_float(w[j].word[k]), bits_float(even.word[k]), both[0]);
            both[1] = fmaf(bits_float(w[j].word[k]), bits_float(odd.word[k]), both[1]);
          }
        }
      }
    }
  }
}

}  // namespace burnish
