// sparse24_linear for many rows on sm_90a: y^T = W x^T by sparse products of whole warpgroups, W and x out of shared
// memory, where the copy engine has put them.
//
// A block stays on its multiprocessor and takes tile after tile of kChannels channels by kRows rows of x. Its warps:
//
//   0        fetches: a stage is 64 bytes of values and 128 of x in each row, two instructions deep; with every few of
//            them comes their metadata, all by load_tile; the ring of stages runs on from tile to tile
//   1        watches: it looks through x for infinities and NaNs, which the sparse product does not multiply where the
//            weight keeps nothing, in turns with the blocks that take other channels of the same rows; what it finds is
//            multiplied again by a kernel of sparse24_linear.cu, launched behind
//   4 to 11  two warpgroups of 64 or 128 channels each multiply; one writes while the other multiplies, or while the
//            next tile is fetched
//
// Large tiles are taken by pairs of blocks, which are a cluster: other channels by the same rows, of which each block
// fetches half for both. Where small tiles are too few for the multiprocessors, the blocks of a cluster share a tile's
// depth, and each adds the sums of all for its rows, in the order of the blocks.
//
// What bounds it is shared memory, at 128 bytes a cycle. Products of 64 channels and N rows, 32 columns deep, take
// N / 2 cycles and read 64 N bytes of x, which is N / 2 cycles too, and 16 more for W. What a stage multiplies in
// C R / 64 cycles is read in C R / 64 of x and C / 2 of W, and R and C / 2 are written before: in all as many times
// 1 + 64 / C + 64 / R. So sums should fill the registers: of a thread's 232 they are 176. Per stage:
//
//   C x R                   128 x 128   128 x 256   256 x 128   256 x 176   256 x 192
//   products, cycles              256         512         512         704         768
//   bytes moved, KB                64         112         112         142         152
//   cycles, with metadata         536         920         944        1184        1264
//   4096 rows and channels       4288        3680        3776        3552        3792    of 132 multiprocessors
//
// 192 rows would gain 2 % where there are tiles enough, and leave int8's sums no registers to be scaled in. The caller
// takes what costs least. The same count gives a gain of 1.25 over dense products for tiles of 128 x 128 in both, where
// 1.2 was seen of CUTLASS's example 62 on an H100.
//
// Values straight from L2 to registers, of which products take W as well, would not move less: loads come by way of L1,
// which is the same memory, so they are written and read there as often; and half of the 16 bytes that a lane loads are
// another lane's, because the 16 bytes of x that copies leave together meet the values of two lanes.
//
// L2 gives a multiprocessor about 39 bytes a cycle when all ask (5120 for 132). Of a stage of 256 x 176 it is asked for
// 29 KB: 25 bytes a cycle. Without the other block's half of x it would be 35, and for 128 x 256 46.
#pragma once

#include "cuda/sparse24.cuh"
#include "cuda/warpgroup.cuh"
#include "cuda/wide.cuh"

namespace burnish {

// kTiles_: of 64 channels, that each warpgroup multiplies. kCluster_: neighbours that take the same rows of x, of which
// each fetches a part.
template <class T_, int kTiles_, int kRows_, int kCluster_>
struct Wide24 {
  using T = T_;
  using Sum = Sum24<T>;
  static constexpr int kTiles = kTiles_, kRows = kRows_, kCluster = kCluster_;
  static constexpr int kChannels = 2 * 64 * kTiles, kBlock = kWideBlock;
  static constexpr bool kSplits = kCluster == 1;  // whether blocks may share a tile's depth
  static constexpr int kStages = kTiles == 1 ? 6 : 4;
  static constexpr int kValueBytes = 64, kXBytes = 128;  // of a row in a stage
  static constexpr int kXRows = kRows / kCluster;        // of x, fetched at a time
  // of metadata a row has a sector for kTurn stages, fewer at the end of a tile but no fewer than kLeast
  static constexpr int kMetadataBytes = 32, kTurn = kQuantised24<T> ? 2 : 4, kLeast = kTurn / 2;
  static constexpr int kMetadataSlots = (kStages - 2 + kLeast - 1) / kLeast + 2;  // that kStages may need
  static constexpr int kPitch = kChannels + 4;  // of sums in the ring's place: a warp then writes to 32 different banks
  // what shared memory moves for a stage: W and x are written, W is read once and x for each 64 channels; and metadata
  static constexpr int kMoved = kChannels * (2 * kValueBytes + 24) + (1 + kChannels / 64) * kRows * kXBytes;
  // shared memory, in bytes
  static constexpr int kX = 0, kValues = kX + kStages * kRows * kXBytes;
  static constexpr int kY = kValues + kStages * kChannels * kValueBytes;
  static constexpr int kMetadata = kY + kYPlaces;
  static constexpr int kBarriers = kMetadata + kMetadataSlots * kChannels * kMetadataBytes;
  static constexpr size_t kShared = kBarriers + 2 * kStages * sizeof(TileBarrier) + kSharedAlignment;
  static_assert(kShared <= (227 << 10), "more shared memory than a block gets");
  static_assert(!kSplits || kRows * kPitch * 4 <= kY, "the sums do not fit in the ring's place");
  static_assert(kXRows % 8 == 0, "the parts of x do not start at whole eights of lines");
  // a block's warps that read a stage, and those that say when it may be overwritten
  static constexpr unsigned kReaders = 8 + (kQuantised24<T> ? 0 : 1), kReleases = kReaders * kCluster;
  static constexpr unsigned kRead = 3;  // the barrier of their threads; 1 and 2 are the warpgroups'
  using Sums = Sum[kTiles][kRows / 2];
  static_assert(kTiles * kYStores<kRows> % 2 == 0, "the next tile of y begins in the place that the last one ended in");
};

struct WideMaps {
  TileMap values, metadata, x, y;
};

// Whether all that is copied by tiles is there and has the alignment for it, rows of x do not lie over each other,
// metadata is whole for a stage, and y has two bytes an element.
inline bool wide24_takes(const Sparse24Problem& p, const DeviceLimits& limits) {
  const bool whole = p.values.width > 0 && p.values.aligned && p.metadata.aligned && p.metadata.width % 16 == 0 &&
                     p.x.aligned && p.x.stride >= p.x.width;
  return limits.warpgroups && whole && p.y_format != Format::kFloat && p.values.rows % 8 == 0;
}

template <class S>
WideMaps wide_maps(const Sparse24Problem& p) {
  return {wide_map(p.values, S::kChannels, S::kValueBytes, Swizzle::k64),
          wide_map(p.metadata, S::kChannels, S::kMetadataBytes, Swizzle::k32),
          wide_map(p.x, S::kXRows, S::kXBytes, Swizzle::k128), wide_map_of_y(p.y, p.x.rows, p.values.rows)};
}

// A place in the ring, and that of the stage's metadata in theirs.
template <class S>
struct RingPlace24 : RingPlace {
  int metadata = 0;  // slot
  int part = 0;      // of the slot's stages

  __device__ void advance() {
    if (++part == S::kTurn) end_turn();
    RingPlace::advance(S::kStages);
  }

  // The next stage is another tile's.
  __device__ void end_tile() {
    if (part > 0) end_turn();
  }

  __device__ void end_turn() {
    part = 0;
    metadata = metadata + 1 == S::kMetadataSlots ? 0 : metadata + 1;
  }
};

template <class S>
struct WideBlock {
  const Sparse24Problem& p;
  unsigned char* shared;
  int splits, rank;  // blocks that share a tile's depth, and which of them this is
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

  // The stage's first word of metadata of 16 channels, for the lane's eight of them: where it is exchanged to.
  __device__ const uint32_t* metadata_of(const RingPlace24<S>& at, int channel) const {
    constexpr int kPart = S::kMetadataBytes / S::kTurn;
    const int unit = at.part * kPart / 16 ^ static_cast<int>(threadIdx.x) % 32 / 16;
    return reinterpret_cast<const uint32_t*>(metadata(at.metadata) + channel * S::kMetadataBytes + unit * 16 +
                                             at.part * kPart % 16);
  }

  // body(tile) for the block's tiles, in order.
  template <class Body>
  __device__ void each_tile(const Body& body) const {
    each_wide_tile(p.values.rows, S::kCluster * S::kChannels, p.x.rows, S::kRows, S::kCluster * splits, body);
  }

  // Which of the tiles of channels is the block's.
  __device__ static int channel_tile(const TileOf& tile) {
    return S::kCluster == 1 ? tile.channel : tile.channel * S::kCluster + static_cast<int>(cluster_rank());
  }

  // By one thread.
  __device__ void fetch(const WideMaps& maps) const {
    constexpr unsigned kStage = S::kRows * S::kXBytes + S::kChannels * S::kValueBytes;
    RingPlace24<S> at;
    each_tile([&](const TileOf& tile) {
      const int row = tile.row * S::kRows, channel = channel_tile(tile) * S::kChannels;
#pragma unroll 1
      for (int stage = begin; stage < end; ++stage) {
        tile_barrier_wait(empty(at.slot), at.turn ^ 1);
        TileBarrier* const arrival = full(at.slot);
        tile_barrier_expect(arrival, kStage + (at.part == 0 ? S::kChannels * S::kMetadataBytes : 0));
        load_tile(values(at.slot), maps.values, stage * S::kValueBytes, channel, arrival);
        if (at.part == 0) {
          load_tile(metadata(at.metadata), maps.metadata, stage / S::kTurn * S::kMetadataBytes, channel, arrival);
        }
        if constexpr (S::kCluster == 1) {
          load_tile(x(at.slot), maps.x, stage * S::kXBytes, row, arrival);
        } else {
          const int first = static_cast<int>(cluster_rank()) * S::kXRows;
          load_tile_to_all<S::kCluster>(x(at.slot) + first * S::kXBytes, maps.x, stage * S::kXBytes, row + first,
                                        arrival);
        }
        at.advance();
      }
      at.end_tile();
    });
  }

  // By a warp: what it has read of a stage may be overwritten.
  __device__ void release(int slot) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (S::kCluster == 1) {
      if (lane == 0) tile_barrier_arrive(empty(slot));
    } else if (lane < S::kCluster) {
      tile_barrier_arrive(empty(slot), lane);
    }
  }

  // By one warp. Says of each tile of rows, and of the block's part of its stages, whether x has an infinity or a NaN
  // there: the first tiles of channels take them by turns.
  __device__ void watch() const {
    const int lane = static_cast<int>(threadIdx.x % 32), watchers = p.special_parts / splits;
    RingPlace24<S> at;
    each_tile([&](const TileOf& tile) {
      const int own = channel_tile(tile);
      uint32_t seen = 0;
#pragma unroll 1
      for (int stage = begin; stage < end; ++stage) {
        tile_barrier_wait(full(at.slot), at.turn);
        if (stage % watchers == own) {
          const Bytes16* units = reinterpret_cast<const Bytes16*>(x(at.slot)) + lane;
#pragma unroll 4
          for (int i = 0; i < S::kRows * S::kXBytes / 16; i += 32) {
            const Bytes16 unit = load(units + i);
#pragma unroll
            for (int word = 0; word < 4; ++word) seen |= without_end<typename S::T>(unit.word[word]);
          }
        }
        __syncwarp();
        release(at.slot);
        at.advance();
      }
      at.end_tile();
      if (own >= watchers) return;
      const bool found = vote_any(kFullWarp, (seen & kWithoutEnd) != 0);
      if (lane == 0) store(p.special + tile.row * p.special_parts + own * splits + rank, int32_t{found});
    });
  }

  // By a warpgroup, before its first tile: the second one begins kLag stages behind the first, so that one multiplies
  // while the other writes.
  __device__ void stagger() const {
    constexpr int kLag = 2;
    if (multiplier() == 1 && end - begin > kLag) tile_barrier_wait(full(kLag), 0);
  }

  // By a warpgroup: the sums of its channels.
  __device__ void multiply(RingPlace24<S>& at, int first_channel, typename S::Sums& sums) const {
    using T = typename S::T;
    if (S::kSplits && begin >= end) {  // of a depth that ends before the block's part of it
      memset(sums, 0, sizeof sums);
      return;
    }
    int before = 0;  // the slot of the stage before
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      tile_barrier_wait(full(at.slot), at.turn);
      uint32_t kept[S::kTiles][2];
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        const int channel = first_channel + i * 64 + warp_channel();
        const Stage24<T, 4> places{nullptr, nullptr, metadata_of(at, channel), S::kMetadataBytes / 4};
        kept[i][0] = places.kept(0, 0);
        kept[i][1] = kQuantised24<T> ? places.kept(0, 1) : kept[i][0];
      }
      const unsigned char* b = x(at.slot);
      warpgroup_fence();
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        const unsigned char* a = values(at.slot) + (first_channel + i * 64) * S::kValueBytes;
        warpgroup_mma_sparse<T>(sums[i], shared_tile<Swizzle::k64>(a), shared_tile<Swizzle::k128>(b), kept[i][0],
                                stage > begin);
        warpgroup_mma_sparse<T, kQuantised24<T> ? 0 : 1>(sums[i], shared_tile<Swizzle::k64>(a + S::kValueBytes / 2),
                                                         shared_tile<Swizzle::k128>(b + S::kXBytes / 2), kept[i][1],
                                                         true);
      }
      warpgroup_commit();
      warpgroup_wait<1>();
      if (stage > begin) release(before);
      before = at.slot;
      at.advance();
    }
    at.end_tile();
    warpgroup_wait<0>();
    release(before);
  }

  // By a warpgroup: y of its i-th 64 channels.
  __device__ void write(const WideMaps& maps, int row, int channel, const typename S::Sum (&sum)[S::kRows / 2],
                        int i) const {
    using T = typename S::T;
    const int lane = static_cast<int>(threadIdx.x % 32);
    float bias[2] = {}, scale[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = channel + warp_channel() + lane / 4 + half * 8;
      if (own >= p.values.rows) continue;
      if (p.bias != nullptr) bias[half] = load_as_float(p.bias, own, p.bias_format);
      if (kQuantised24<T>) scale[half] = load(p.scale + own);
    }
    const auto finish = [&](typename S::Sum total, int own, int half) {
      const float row_scale = kQuantised24<T> ? load(p.row_scale + own) : 0.0f;
      return finished<T>(p, total, row_scale, scale[half], bias[half]);
    };
    write_wide(maps.y, shared + S::kY, row, channel, p.y_format == Format::kBf16, sum, finish, i * kYStores<S::kRows>);
  }

  // By a warpgroup: its sums to the ring's place, for the blocks of the cluster.
  __device__ void share(int first_channel, const typename S::Sum (&sum)[S::kRows / 2]) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    auto* sums = reinterpret_cast<typename S::Sum*>(shared) + first_channel + warp_channel() + lane / 4;
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
    if (!S::kSplits) splits = 1;  // as the compiler then knows
    const int all = (p.values.width - 1) / S::kValueBytes + 1;
    const int each = ((all - 1) / splits / S::kTurn + 1) * S::kTurn, rank = static_cast<int>(blockIdx.x) % splits;
    const int begin = rank * each, end = begin + each < all ? begin + each : all;
    const WideBlock<S> block{p, aligned_shared_memory<unsigned char>(), splits, rank, begin, end};
    const bool together = S::kCluster > 1 || splits > 1;  // whether the block is one of a cluster
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < S::kStages; ++slot) {
        tile_barrier_init(block.full(slot), 1);
        tile_barrier_init(block.empty(slot), S::kReleases);
      }
      tile_barriers_ready();
    }
    if constexpr (S::kCluster > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
    dependents_start();
    if (threadIdx.x < kWarpgroup) {
      warpgroup_registers<40, false>();
      if (threadIdx.x == 0) block.fetch(maps);
      if (!kQuantised24<typename S::T> && threadIdx.x / 32 == 1) {
        block.watch();
        if (splits > 1) barrier_arrive(S::kRead, 32 * S::kReaders);
      }
    } else {
      warpgroup_registers<kMultiplierRegisters<40>, true>();
      const int first_channel = multiplier() * 64 * S::kTiles;
      RingPlace24<S> at;
      typename S::Sums sums;
      if (splits == 1) block.stagger();
      block.each_tile([&](const TileOf& tile) {
        block.multiply(at, first_channel, sums);
        if (splits == 1) {
          const int channel = block.channel_tile(tile) * S::kChannels + first_channel;
#pragma unroll
          for (int i = 0; i < S::kTiles; ++i) block.write(maps, tile.row * S::kRows, channel + i * 64, sums[i], i);
        } else {
          barrier_sync(S::kRead, 32 * S::kReaders);  // until all have read the ring
          block.share(first_channel, sums[0]);       // the block has no other tile
        }
      });
      if (threadIdx.x % kWarpgroup == 0) store_tile_wait<0>();
    }
    __syncwarp();
    if (together) cluster_barrier();  // until the others neither copy here nor arrive, and have stored their sums
    if (splits > 1) {
      if (threadIdx.x >= kWarpgroup) block.each_tile([&](const TileOf& tile) { block.finish(tile); });
      cluster_barrier();  // until the others have read this block's sums
    }
  }
}

}  // namespace burnish
