// What kernels for many rows on sm_90a share: y^T = W x^T by products of whole warpgroups out of shared memory, where
// the copy engine has put W and x, a ring of stages that runs on from tile to tile, and y that leaves in rows.
#pragma once

#include "cuda/operand.cuh"
#include "cuda/tile_of.cuh"
#include "cuda/warpgroup.cuh"

namespace burnish {

// A block: a warpgroup that fetches and two that multiply, 64 channels each by all rows of the tile.
constexpr int kWideBlock = 3 * kWarpgroup, kWideChannels = 128;
constexpr int kMaxWideRows = 1 << 29;      // of a matrix: coordinates of tiles are ints
constexpr int kYRows = 64, kYBytes = 128;  // of y, stored at a time by a warpgroup, from one of its two places
constexpr int kYPlaces = 2 * 2 * kYRows * kYBytes;

// A block's threads have 168 registers each. Those that multiply need more, with 128 sums: what the others leave them.
template <int kOthers>
constexpr int kMultiplierRegisters = (3 * 168 - kOthers) / 2 / 8 * 8;

inline TileMap wide_map(const Operand& of, int rows, int bytes, Swizzle swizzle) {
  return tile_map(
      {of.data, of.rows, of.width, of.stride, static_cast<unsigned>(rows), static_cast<unsigned>(bytes), swizzle});
}

// Of y [rows, channels], two bytes an element.
inline TileMap wide_map_of_y(void* y, int rows, int channels) {
  const Operand whole{static_cast<const unsigned char*>(y), channels * 2, rows, channels * 2, true};
  return wide_map(whole, kYRows, kYBytes, Swizzle::k128);
}

// A place in a ring of stages, and how often it has come round.
struct RingPlace {
  int slot = 0;
  unsigned turn = 0;  // its parity

  __device__ void advance(int stages) {
    if (++slot == stages) {
      slot = 0;
      turn ^= 1;
    }
  }
};

// body(tile) for the tiles that a block, or `together` neighbours, take in turn.
template <class Body>
__device__ void each_wide_tile(int channels, int tile_channels, int rows, int tile_rows, int together,
                               const Body& body) {
  const int across = (channels - 1) / tile_channels + 1, down = (rows - 1) / tile_rows + 1, all = across * down;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x) / together; i < all; i += static_cast<int>(gridDim.x) / together) {
    body(TileOf(i, across, down));
  }
}

// The number of a thread's warpgroup among those that multiply, and of the first of its warp's 16 channels.
__device__ inline int multiplier() { return static_cast<int>(threadIdx.x) / kWarpgroup - 1; }
__device__ inline int warp_channel() { return static_cast<int>(threadIdx.x) / 32 % 4 * 16; }

// By a warpgroup: a tile of y, from its first row and the warpgroup's first channel on, turned in shared memory. `out`:
// kYPlaces bytes of the block; `stored`: how often the warpgroup has stored there before, or a number as odd or even.
// finish(sum, row, which of the thread's two channels) is what y holds.
template <class Sum, int Words>
__device__ void write_wide(const TileMap& y, unsigned char* out, int row, int channel, bool is_bf16,
                           const Sum (&sum)[Words], const auto& finish, int stored = 0) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned barrier = 1u + static_cast<unsigned>(multiplier());
  const bool speaks = threadIdx.x % kWarpgroup == 0;
#pragma unroll
  for (int chunk = 0; chunk < Words * 2 / kYRows; ++chunk) {
    unsigned char* const place = out + (multiplier() * 2 + (stored + chunk) % 2) * (kYRows * kYBytes);
    if (speaks) store_tile_wait<1>();
    barrier_sync(barrier, kWarpgroup);
#pragma unroll
    for (int pair = 0; pair < kYRows / 16; ++pair) {
      uint32_t tiles[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows of x from 8 (i / 2) on, channels from 8 (i % 2) on
        const int rows = chunk * kYRows + pair * 16 + i / 2 * 8;
        float z[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          z[r] = finish(sum[rows / 8 * 4 + i % 2 * 2 + r], row + rows + lane % 4 * 2 + r, i % 2);
        }
        tiles[i] = is_bf16 ? pack_bf16(z[0], z[1]) : pack_fp16(z[0], z[1]);
      }
      const int line = pair * 16 + lane / 16 * 8 + lane % 8, unit = warp_channel() / 8 + lane / 8 % 2;
      store_matrix_transposed(place + line * kYBytes + (unit ^ line % 8) * 16, tiles);
    }
    copies_see_stores();
    barrier_sync(barrier, kWarpgroup);
    if (speaks) {
      store_tile(y, place, channel * 2, row + chunk * kYRows);
      store_tile_commit();
    }
  }
}

}  // namespace burnish
