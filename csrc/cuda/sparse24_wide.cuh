// sparse24_linear for many rows on sm_90a: y^T = W x^T by sparse products of whole warpgroups, W and x out of shared
// memory, where the copy engine has put them.
//
// A block stays on its multiprocessor and takes tile after tile of 128 channels by kRows rows of x. Its warps:
//
//   0        fetches: a stage is 64 bytes of values and 128 of x in each row, two instructions deep; with them comes
//            the metadata of one or two stages, all by load_tile; the ring of stages runs on from tile to tile
//   1        watches: on the tiles of the first channels it looks through x for infinities and NaNs, which the sparse
//            product does not multiply where the weight keeps nothing; what it finds is multiplied again by a kernel of
//            sparse24_linear.cu, launched behind
//   4 to 11  two warpgroups of 64 channels each multiply, and write while the next tile is fetched
//
// Where the tiles are too few for the multiprocessors, the blocks of a cluster share a tile's depth, and each adds the
// sums of all for its rows, in the order of the blocks.
//
// Per 128 x 256 outputs and stage a multiprocessor moves 40 KB into shared memory and reads 72 KB of it (each warpgroup
// all of x, twice 32 bytes of its rows), 875 cycles at 128 bytes; the products take 512. So x should be read by as few
// instructions as the sums' registers allow: 64 channels by 256 rows each.
#pragma once

#include "cuda/sparse24.cuh"
#include "cuda/warpgroup.cuh"

namespace burnish {

template <class T_, int kRows_>
struct Wide24 {
  using T = T_;
  using Sum = Sum24<T>;
  static constexpr int kRows = kRows_;
  static constexpr int kChannels = 128, kBlock = 3 * kWarpgroup;
  static constexpr int kStages = kRows == 256 ? 4 : 6;
  static constexpr bool kSplits = kRows <= 128;                               // whether blocks may share a tile's depth
  static constexpr int kValueBytes = 64, kXBytes = 128, kMetadataBytes = 16;  // of a row in a stage, or in kTurn
  static constexpr int kTurn = kQuantised24<T> ? 1 : 2;
  static constexpr int kMetadataSlots = (kStages - 1) / kTurn + 1 + (kTurn - 1);
  static constexpr int kOutRows = 64, kOutBytes = 128;  // of y, stored at a time by a warpgroup
  static constexpr int kOut = kOutRows * kOutBytes;
  static constexpr int kPitch = kChannels + 4;  // of sums in the ring's place: a warp then writes to 32 different banks
  // shared memory, in bytes
  static constexpr int kX = 0, kValues = kX + kStages * kRows * kXBytes;
  static constexpr int kY = kValues + kStages * kChannels * kValueBytes;
  static constexpr int kMetadata = kY + 2 * 2 * kOut;
  static constexpr int kBarriers = kMetadata + kMetadataSlots * kChannels * kMetadataBytes;
  static constexpr size_t kShared = kBarriers + 2 * kStages * sizeof(TileBarrier) + kSharedAlignment;
  static_assert(kShared <= (227 << 10), "more shared memory than a block gets");
  static_assert(!kSplits || kRows * kPitch * 4 <= kY, "the sums do not fit in the ring's place");
  // the warps that say when a stage may be overwritten
  static constexpr unsigned kReaders = 8 + (kQuantised24<T> ? 0 : 1);
  static constexpr unsigned kRead = 3;  // the barrier of their threads; 1 and 2 are the warpgroups'
};

struct WideMaps {
  TileMap values, metadata, x, y;
};

// Whether all that is copied by tiles is there and has the alignment for it, whole metadata of a stage, and y two bytes
// an element.
inline bool wide24_takes(const Sparse24Problem& p, const DeviceLimits& limits) {
  const bool whole =
      p.values.width > 0 && p.values.aligned && p.metadata.aligned && p.metadata.width % 16 == 0 && p.x.aligned;
  return limits.warpgroups && whole && p.y_format != Format::kFloat && p.values.rows % 8 == 0;
}

template <class S>
WideMaps wide_maps(const Sparse24Problem& p) {
  const auto map = [](const Operand& of, int rows, int bytes, Swizzle swizzle) {
    return tile_map(
        {of.data, of.rows, of.width, of.stride, static_cast<unsigned>(rows), static_cast<unsigned>(bytes), swizzle});
  };
  const int width = p.values.rows * 2;
  const Operand y{static_cast<const unsigned char*>(p.y), width, p.x.rows, width, true};
  return {map(p.values, S::kChannels, S::kValueBytes, Swizzle::k64),
          map(p.metadata, S::kChannels, S::kMetadataBytes, Swizzle::kNone),
          map(p.x, S::kRows, S::kXBytes, Swizzle::k128), map(y, S::kOutRows, S::kOutBytes, Swizzle::k128)};
}

// A place in the ring of stages, and how often it has come round.
template <class S>
struct RingPlace {
  int slot = 0;
  unsigned turn = 0;  // its parity
  int metadata = 0;   // slot of the stage's metadata
  int part = 0;       // of the metadata's stages

  __device__ void advance() {
    if (++part == S::kTurn) {
      part = 0;
      metadata = metadata + 1 == S::kMetadataSlots ? 0 : metadata + 1;
    }
    if (++slot == S::kStages) {
      slot = 0;
      turn ^= 1;
    }
  }
};

template <class S>
struct WideBlock {
  const Sparse24Problem& p;
  unsigned char* shared;
  int splits, rank;  // blocks that share a tile, and which of them this is
  int begin, end;    // stages

  __device__ TileBarrier* full(int slot) const { return reinterpret_cast<TileBarrier*>(shared + S::kBarriers) + slot; }
  __device__ TileBarrier* empty(int slot) const { return full(S::kStages + slot); }
  __device__ unsigned char* x(int slot) const { return shared + S::kX + slot * (S::kRows * S::kXBytes); }
  __device__ unsigned char* values(int slot) const {
    return shared + S::kValues + slot * (S::kChannels * S::kValueBytes);
  }
  __device__ unsigned char* metadata(int slot) const {
    return shared + S::kMetadata + slot * (S::kChannels * S::kMetadataBytes);
  }

  __device__ int channel_tiles() const { return (p.values.rows - 1) / S::kChannels + 1; }
  __device__ int row_tiles() const { return (p.x.rows - 1) / S::kRows + 1; }

  // body(tile) for the block's tiles, in order.
  template <class Body>
  __device__ void each_tile(const Body& body) const {
    const int columns = channel_tiles(), rows = row_tiles(), all = columns * rows;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) / splits; i < all; i += static_cast<int>(gridDim.x) / splits) {
      body(TileOf(i, columns, rows));
    }
  }

  // By one thread.
  __device__ void fetch(const WideMaps& maps) const {
    constexpr unsigned kStage = S::kRows * S::kXBytes + S::kChannels * S::kValueBytes;
    RingPlace<S> at;
    each_tile([&](const TileOf& tile) {
      const int row = tile.row * S::kRows, channel = tile.channel * S::kChannels;
#pragma unroll 1
      for (int stage = begin; stage < end; ++stage) {
        tile_barrier_wait(empty(at.slot), at.turn ^ 1);
        TileBarrier* const arrival = full(at.slot);
        tile_barrier_expect(arrival, kStage + (at.part == 0 ? S::kChannels * S::kMetadataBytes : 0));
        load_tile(values(at.slot), maps.values, stage * S::kValueBytes, channel, arrival);
        if (at.part == 0) {
          load_tile(metadata(at.metadata), maps.metadata, stage / S::kTurn * S::kMetadataBytes, channel, arrival);
        }
        load_tile(x(at.slot), maps.x, stage * S::kXBytes, row, arrival);
        at.advance();
      }
    });
  }

  // By one warp. Says of each tile of rows, and of the block's depth, whether x has an infinity or a NaN there.
  __device__ void watch() const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    RingPlace<S> at;
    each_tile([&](const TileOf& tile) {
      uint32_t seen = 0;
#pragma unroll 1
      for (int stage = begin; stage < end; ++stage) {
        tile_barrier_wait(full(at.slot), at.turn);
        if (tile.channel == 0) {
          const Bytes16* units = reinterpret_cast<const Bytes16*>(x(at.slot)) + lane;
#pragma unroll 4
          for (int i = 0; i < S::kRows * S::kXBytes / 16; i += 32) {
            const Bytes16 unit = load(units + i);
#pragma unroll
            for (int word = 0; word < 4; ++word) seen |= without_end<typename S::T>(unit.word[word]);
          }
        }
        __syncwarp();
        if (lane == 0) tile_barrier_arrive(empty(at.slot));
        at.advance();
      }
      if (tile.channel != 0) return;
      const bool found = vote_any(kFullWarp, (seen & kWithoutEnd) != 0);
      if (lane == 0) store(p.special + tile.row * splits + rank, int32_t{found});
    });
  }

  // By a warpgroup: the sums of its 64 channels.
  __device__ void multiply(RingPlace<S>& at, int first_channel, typename S::Sum (&sum)[S::kRows / 2]) const {
    using T = typename S::T;
    const int channel = first_channel + static_cast<int>(threadIdx.x % kWarpgroup / 32) * 16;  // the warp's
    const bool speaks = threadIdx.x % 32 == 0;
    if (S::kSplits && begin >= end) {  // of a depth that ends before the block's part of it
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) sum[i] = 0;
      return;
    }
    int before = 0;  // the slot of the stage before
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      tile_barrier_wait(full(at.slot), at.turn);
      const auto* words = reinterpret_cast<const uint32_t*>(metadata(at.metadata) + channel * S::kMetadataBytes);
      const Stage24<T, 4> places{nullptr, nullptr, words + at.part * 2, S::kMetadataBytes / 4};
      const uint32_t first = places.kept(0, 0), second = kQuantised24<T> ? places.kept(0, 1) : first;
      const unsigned char* a = values(at.slot) + first_channel * S::kValueBytes;
      const unsigned char* b = x(at.slot);
      warpgroup_fence();
      warpgroup_mma_sparse<T>(sum, shared_tile<Swizzle::k64>(a), shared_tile<Swizzle::k128>(b), first, stage > begin);
      warpgroup_mma_sparse<T, kQuantised24<T> ? 0 : 1>(sum, shared_tile<Swizzle::k64>(a + S::kValueBytes / 2),
                                                       shared_tile<Swizzle::k128>(b + S::kXBytes / 2), second, true);
      warpgroup_commit();
      warpgroup_wait<1>();
      if (speaks && stage > begin) tile_barrier_arrive(empty(before));
      before = at.slot;
      at.advance();
    }
    warpgroup_wait<0>();
    if (speaks) tile_barrier_arrive(empty(before));
  }

  // Two neighbours of a column of y.
  __device__ uint32_t packed(float low, float high) const {
    return p.y_format == Format::kBf16 ? pack_bf16(low, high) : pack_fp16(low, high);
  }

  // By a warpgroup: y of its channels, turned in shared memory, kOutRows rows at a time.
  __device__ void write(const WideMaps& maps, const TileOf& tile, int first_channel,
                        const typename S::Sum (&sum)[S::kRows / 2]) const {
    using T = typename S::T;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x % kWarpgroup / 32);
    const unsigned group = threadIdx.x / kWarpgroup;  // 1 or 2: its barrier too
    const bool speaks = threadIdx.x % kWarpgroup == 0;
    const int channel = tile.channel * S::kChannels + first_channel, row = tile.row * S::kRows;
    float bias[2] = {}, scale[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = channel + warp * 16 + lane / 4 + i * 8;
      if (own >= p.values.rows) continue;
      if (p.bias != nullptr) bias[i] = load_as_float(p.bias, own, p.bias_format);
      if (kQuantised24<T>) scale[i] = load(p.scale + own);
    }
#pragma unroll
    for (int chunk = 0; chunk < S::kRows / S::kOutRows; ++chunk) {
      unsigned char* const out = shared + S::kY + (static_cast<int>(group - 1) * 2 + chunk % 2) * S::kOut;
      if (speaks) store_tile_wait<1>();
      barrier_sync(group, kWarpgroup);
#pragma unroll
      for (int pair = 0; pair < S::kOutRows / 16; ++pair) {
        uint32_t tiles[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows of x from 8 (i / 2) on, channels from 8 (i % 2) on
          const int rows = chunk * S::kOutRows + pair * 16 + i / 2 * 8;
          float z[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int own = row + rows + lane % 4 * 2 + r;
            const float row_scale = kQuantised24<T> && own < p.x.rows ? load(p.row_scale + own) : 0.0f;
            z[r] = finished<T>(p, sum[rows / 8 * 4 + i % 2 * 2 + r], row_scale, scale[i % 2], bias[i % 2]);
          }
          tiles[i] = packed(z[0], z[1]);
        }
        const int line = pair * 16 + lane / 16 * 8 + lane % 8, unit = warp * 2 + lane / 8 % 2;
        store_matrix_transposed(out + line * S::kOutBytes + (unit ^ line % 8) * 16, tiles);
      }
      copies_see_stores();
      barrier_sync(group, kWarpgroup);
      if (speaks) {
        store_tile(maps.y, out, channel * 2, row + chunk * S::kOutRows);
        store_tile_commit();
      }
    }
  }

  // By a warpgroup: its sums to the ring's place, for the blocks of the cluster.
  __device__ void share(int first_channel, const typename S::Sum (&sum)[S::kRows / 2]) const {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x % kWarpgroup / 32);
    auto* sums = reinterpret_cast<typename S::Sum*>(shared) + first_channel + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < S::kRows / 2; ++i) {
      store(sums + (i / 4 * 8 + lane % 4 * 2 + i % 2) * S::kPitch + i / 2 % 2 * 8, sum[i]);
    }
  }

  // By both warpgroups.
  __device__ void finish(const TileOf& tile) const {
    finish_tile<S, false>(p, reinterpret_cast<const typename S::Sum*>(shared), tile.channel * S::kChannels,
                          tile.row * S::kRows, splits, static_cast<int>(threadIdx.x) - kWarpgroup);
  }
};

template <class S>
__global__ void __launch_bounds__(S::kBlock, 1)
    sparse24_linear_fwd_kernel_wide(Sparse24Problem p, const __grid_constant__ WideMaps maps, int splits) {
  if constexpr (kHasWarpgroups) {
    const int all = (p.values.width - 1) / S::kValueBytes + 1;
    const int each = ((all - 1) / splits / S::kTurn + 1) * S::kTurn, rank = static_cast<int>(blockIdx.x) % splits;
    const int begin = rank * each, end = begin + each < all ? begin + each : all;
    const WideBlock<S> block{p, aligned_shared_memory<unsigned char>(), splits, rank, begin, end};
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < S::kStages; ++slot) {
        tile_barrier_init(block.full(slot), 1);
        tile_barrier_init(block.empty(slot), S::kReaders);
      }
      tile_barriers_ready();
    }
    __syncthreads();
    dependents_start();
    // 3 x 128 threads have 168 registers each: those that multiply need more, with 128 sums
    if (threadIdx.x < kWarpgroup) {
      warpgroup_registers<40, false>();
      if (threadIdx.x == 0) block.fetch(maps);
      if (!kQuantised24<typename S::T> && threadIdx.x / 32 == 1) {
        block.watch();
        if (splits > 1) barrier_arrive(S::kRead, 32 * S::kReaders);
      }
    } else {
      warpgroup_registers<232, true>();
      const int first_channel = (static_cast<int>(threadIdx.x) / kWarpgroup - 1) * 64;
      RingPlace<S> at;
      typename S::Sum sum[S::kRows / 2];
      block.each_tile([&](const TileOf& tile) {
        block.multiply(at, first_channel, sum);
        if (!S::kSplits || splits == 1) return block.write(maps, tile, first_channel, sum);
        barrier_sync(S::kRead, 32 * S::kReaders);  // until all have read the ring
        block.share(first_channel, sum);           // the block has no other tile
      });
      if (threadIdx.x % kWarpgroup == 0) store_tile_wait<0>();
    }
    if (S::kSplits && splits > 1) {
      __syncwarp();
      cluster_barrier();
      if (threadIdx.x >= kWarpgroup) block.each_tile([&](const TileOf& tile) { block.finish(tile); });
      cluster_barrier();  // until the others have read this block's sums
    }
  }
}

}  // namespace burnish
