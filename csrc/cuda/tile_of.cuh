// The order in which blocks take tiles of a product.
#pragma once

namespace burnish {

// Blocks that are neighbours share rows of x and of the weight in L2: they take the tiles of eight row tiles together.
struct TileOf {
  int channel, row;

  __device__ TileOf(int tile, int channel_tiles, int row_tiles) {
    constexpr int kTogether = 8;
    const int first = tile / (kTogether * channel_tiles) * kTogether, within = tile % (kTogether * channel_tiles);
    const int together = row_tiles - first < kTogether ? row_tiles - first : kTogether;
    row = first + within % together;
    channel = within / together;
  }
};

}  // namespace burnish
