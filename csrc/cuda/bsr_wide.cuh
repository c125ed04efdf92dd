// bsr_linear for many rows on sm_90a, with blocks of 128 by 128: y^T = W x^T + bias by products of whole warpgroups.
//
// A stripe is a row of blocks: 128 channels, and a list of blocks. A block of threads stays on its multiprocessor and
// takes tile after tile of a stripe by kRows rows of x. Its warps:
//
//   0        fetches: a stage is half of a block, 64 columns, and those columns of x. It draws the tiles, reads which
//            blocks they have, a block ahead, and passes on what is to be multiplied; the ring runs on between tiles
//   4 to 11  two warpgroups of 64 channels each multiply, and write while the next tile is fetched
//
// Stripes differ in their numbers of blocks, and the last tiles decide how long the GPU waits. So a block draws its
// next tile when it has fetched the one before, and tiles of the longest stripes come first, in each eight tiles of
// rows. By a simulation of 32 stripes with 16 or 3 of 32 blocks on average, 16 tiles of rows, 132 multiprocessors, and
// tiles that take the time of 0.2 blocks beside their products, 0.95 and 0.89 of the time is products; tiles that are
// drawn in the stripes' own order have 0.87 and 0.75, and blocks that walk the tiles in steps of their number 0.83 and
// 0.63, whichever stripes come first.
//
// The 0.2 are because the second warpgroup begins two stages behind the first: one multiplies while the other writes.
// By a simulation of the two, with 1280 cycles for y, it is 0.6 where they begin together.
#pragma once

#include "cuda/format.cuh"
#include "cuda/warpgroup.cuh"
#include "cuda/wide_ring.cuh"

namespace burnish {

constexpr int kMaxSortedStripes = 256;  // in a multiprocessor's shared memory; of more, the last ones
constexpr int kBeyond = 1 << 30;        // a row that no matrix has

struct BsrProblem {
  Operand x;
  const int32_t* starts;   // [stripes + 1], of each stripe's blocks
  const int32_t* columns;  // [blocks], of blocks
  const void* bias;        // [channels], or null
  uint32_t* ticket;
  int channels;
  Format bias_format;
};

struct WideBsrMaps {
  TileMap x, values, y;  // values: rows of 128 of a block, block after block
};

template <class T_, int kRows_>
struct WideBsr {
  using T = T_;
  using Ring = WideRing<T, kRows_>;
  static constexpr int kRows = kRows_, kStageBytes = Ring::kStageBytes;
  static constexpr int kHalves = 2, kBlockBytes = kHalves * kStageBytes;  // of a row of a block
  static constexpr int kParts = 4;                                        // tiles that the fetching warp may be ahead
  // shared memory behind the ring, in bytes
  static constexpr int kPart = Ring::kEnd;
  static constexpr int kPartBarriers = kPart + kParts * static_cast<int>(sizeof(Bytes16));
  static constexpr int kOrder = kPartBarriers + 2 * kParts * static_cast<int>(sizeof(TileBarrier));
  static constexpr size_t kShared = kOrder + kMaxSortedStripes * sizeof(int32_t) + kSharedAlignment;
  static_assert(kPart % sizeof(Bytes16) == 0 && kShared <= (227 << 10), "more shared memory than a block gets");
};

template <class S>
struct WideBsrBlock {
  using T = typename S::T;
  const BsrProblem& p;
  typename S::Ring ring;

  // What the warpgroups multiply next, as 16 bytes in shared memory; no stages after the last tile.
  struct Part {
    int row, channel, stages;
  };

  __device__ TileBarrier* part_full(int slot) const {
    return reinterpret_cast<TileBarrier*>(ring.shared + S::kPartBarriers) + slot;
  }
  __device__ TileBarrier* part_empty(int slot) const { return part_full(S::kParts + slot); }
  __device__ Bytes16* part(int slot) const { return reinterpret_cast<Bytes16*>(ring.shared + S::kPart) + slot; }
  __device__ int32_t* order() const { return reinterpret_cast<int32_t*>(ring.shared + S::kOrder); }
  __device__ int32_t* lengths() const { return reinterpret_cast<int32_t*>(ring.y()); }  // before the first tile

  __device__ int stripes() const { return (p.channels - 1) / kWideChannels + 1; }
  __device__ int row_tiles() const { return (p.x.rows - 1) / S::kRows + 1; }
  __device__ int unsorted() const { return stripes() > kMaxSortedStripes ? stripes() - kMaxSortedStripes : 0; }

  // By one thread.
  __device__ void initialize() const {
    ring.initialize();
    for (int slot = 0; slot < S::kParts; ++slot) {
      tile_barrier_init(part_full(slot), 1);
      tile_barrier_init(part_empty(slot), S::Ring::kReaders);
    }
    tile_barriers_ready();
  }

  // By all threads: the last stripes, the longest first and of equal ones the first.
  __device__ void sort() const {
    const int first = unsorted(), sorted = stripes() - first;
    for (int i = static_cast<int>(threadIdx.x); i < sorted; i += kWideBlock) {
      store(lengths() + i, load(p.starts + first + i + 1) - load(p.starts + first + i));
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < sorted; i += kWideBlock) {
      const int32_t own = load(lengths() + i);
      int place = 0;
#pragma unroll 4
      for (int other = 0; other < sorted; ++other) {
        const int32_t length = load(lengths() + other);
        place += length > own || (length == own && other < i);
      }
      store(order() + place, int32_t{first + i});
    }
    __syncthreads();
  }

  __device__ int stripe_at(int place) const {
    return place < unsorted() ? place : load(order() + (place - unsorted()));
  }

  // By one thread: the block's next tile, and none is there from the number of tiles on. Each block has its first tile
  // without a ticket, so that of as many tickets as tiles the last one is drawn.
  __device__ int next_tile(int tiles) const {
    const auto ticket = static_cast<int>(draw_ticket(p.ticket));
    if (ticket == tiles - 1) store(p.ticket, 0u);
    return ticket + static_cast<int>(gridDim.x);
  }

  // By one thread.
  __device__ void pass(RingPlace& to, const Part& next) const {
    tile_barrier_wait(part_empty(to.slot), to.turn ^ 1);
    store(part(to.slot), Bytes16{{static_cast<uint32_t>(next.row), static_cast<uint32_t>(next.channel),
                                  static_cast<uint32_t>(next.stages), 0}});
    tile_barrier_arrive(part_full(to.slot));
    to.advance(S::kParts);
  }

  // By each warp.
  __device__ Part take(RingPlace& from) const {
    tile_barrier_wait(part_full(from.slot), from.turn);
    const Bytes16 next = load(part(from.slot));
    __syncwarp();
    if (threadIdx.x % 32 == 0) tile_barrier_arrive(part_empty(from.slot));
    from.advance(S::kParts);
    return {static_cast<int>(next.word[0]), static_cast<int>(next.word[1]), static_cast<int>(next.word[2])};
  }

  // By one thread. A stripe without blocks has a stage from beyond the matrices, which is zeros.
  __device__ void fetch(const WideBsrMaps& maps) const {
    const int across = stripes(), down = row_tiles(), tiles = across * down;
    RingPlace at, to;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x); i < tiles; i = next_tile(tiles)) {
      const TileOf tile(i, across, down);
      const int stripe = stripe_at(tile.channel), row = tile.row * S::kRows;
      const int first = load(p.starts + stripe), end = load(p.starts + stripe + 1);
      pass(to, {row, stripe * kWideChannels, first < end ? (end - first) * S::kHalves : 1});
      if (first == end) ring.fetch(at, maps.values, {0, kBeyond}, maps.x, {0, kBeyond});
      int column = first < end ? load(p.columns + first) : 0;
#pragma unroll 1
      for (int block = first; block < end; ++block) {
        const int byte = column * S::kBlockBytes;
        if (block + 1 < end) column = load(p.columns + block + 1);
#pragma unroll
        for (int half = 0; half < S::kBlockBytes; half += S::kStageBytes) {
          ring.fetch(at, maps.values, {half, block * kWideChannels}, maps.x, {byte + half, row});
        }
      }
    }
    pass(to, {0, 0, 0});
  }

  // By a warpgroup: y of its channels, tile after tile.
  __device__ void multiply_all(const WideBsrMaps& maps) const {
    RingPlace at, from;
    float sum[S::kRows / 2];
    Part next = take(from);
    ring.stagger(next.stages);
#pragma unroll 1
    for (; next.stages > 0; next = take(from)) {
      const int channel = next.channel + multiplier() * 64;
      float bias[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int own = channel + warp_channel() + static_cast<int>(threadIdx.x % 32) / 4 + i * 8;
        if (p.bias != nullptr && own < p.channels) bias[i] = load_as_float(p.bias, own, p.bias_format);
      }
      const int last = ring.multiply(at, next.stages, sum);
      warpgroup_wait<0>();
      ring.release(last);
      const auto finish = [&](float total, int, int i) { return p.bias != nullptr ? total + bias[i] : total; };
      write_wide(maps.y, ring.y(), next.row, channel, std::is_same_v<T, bf16>, sum, finish);
    }
    if (threadIdx.x % kWarpgroup == 0) store_tile_wait<0>();
  }
};

template <class S>
__global__ void __launch_bounds__(kWideBlock, 1)
    bsr_linear_fwd_kernel_wide(BsrProblem p, const __grid_constant__ WideBsrMaps maps) {
  if constexpr (kHasWarpgroups) {
    const WideBsrBlock<S> block{p, {aligned_shared_memory<unsigned char>()}};
    if (threadIdx.x == 0) block.initialize();
    block.sort();
    if (threadIdx.x < kWarpgroup) {
      warpgroup_registers<40, false>();
      if (threadIdx.x == 0) block.fetch(maps);
    } else {
      warpgroup_registers<kMultiplierRegisters<40>, true>();
      block.multiply_all(maps);
    }
  }
}

}  // namespace burnish
