// bsr_linear for many rows on sm_90a, with blocks of 128 by 128: y^T = W x^T + bias by products of whole warpgroups.
//
// A stripe is a row of blocks: 128 channels, and a list of blocks. Two blocks of threads, a pair, are a cluster and
// take tile after tile of a stripe by twice kRows rows of x, kRows each. Each fetches half of the stripe's blocks'
// channels for both. Where there are too few rows for pairs, each block takes its own tiles. A block's warps:
//
//   0        fetches: a stage is half of a block, 64 columns, and those columns of x; the ring runs on between tiles
//   1        draws the pair's tiles, in its first block, and tells all others of both what the next one is
//   4 to 11  two warpgroups of 64 channels each multiply, and write while the next tile is fetched
//
// L2 gives a multiprocessor about 39 bytes a cycle when all ask (5120 for 132), shared memory moves 128. Products of
// 128 x 128 weights with kRows rows take 8 kRows cycles; in shared memory they write W and x, read W once and x twice:
//
//   kRows                              128     176     192     256
//   products of a block, cycles       1024    1408    1536    2048
//   shared memory, cycles             1280    1568    1664    2048
//   of L2, cycles, alone              1690    2006    2112    2534    64 to 48 bytes a cycle of products
//   of L2, cycles, in pairs           1267    1584    1690    2112    48 to 40
//   4096 rows at 50 %, alone           214     191     193     162    thousands of cycles: 127 are the products
//   4096 rows at 50 %, in pairs        165     154     159     137
//   4096 rows at 10 %, in pairs       34.3    32.7    33.9    29.1    alone at 256 rows 34.9; 25 are the products
//   2048 rows at 50 %, in pairs         84      78      83      70    alone at 256 rows 82
//   512 rows at 50 %, in pairs        28.1    34.5    36.6    45.0    alone at 128 rows 32.6
//
// The lower half are simulations of 32 stripes with 16 or 3 of 32 blocks on average, 132 multiprocessors, and tiles
// that take the time of 0.2 blocks beside their products. So 256 rows are best where there are tiles enough for all,
// 128 where not, and pairs in both. An odd tile of rows leaves one of a pair nothing to multiply: in the same
// simulations pairs lose up to a quarter with 1 or 3 tiles of rows, and nothing from 5 on. Clusters of four would ask
// for 36 bytes, but leave multiprocessors without work where those of a GPC are no multiple of four.
//
// Stripes differ in their numbers of blocks, and the last tiles decide how long the GPU waits. So pairs draw their
// tiles when they come to the last block of the one before, and tiles of the longest stripes come first, in each eight
// tiles of rows. Without L2's limit 0.95 and 0.90 of the time is products then, for pairs as for blocks alone; tiles
// that are drawn in the stripes' own order have 0.87 and 0.75, and blocks that walk the tiles in steps of their number
// 0.83 and 0.63, whichever stripes come first. Drawing costs two trips to L2, and one to the other block. By a
// simulation of the rings it is hidden where it begins two stages before the last is fetched: with 3 blocks a tile that
// gains 3 %, and a draw two blocks earlier than that, ahead of a whole tile, costs 9 % at the end.
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

// What a block multiplies next, 16 bytes in shared memory: rows of x, channels, and a stripe's blocks, or kNoMore.
struct alignas(16) WideBsrPart {
  static constexpr int kNoMore = -1;
  int row, channel, first, blocks;
};

// kCluster_: neighbours that take the same stripe by other rows.
template <class T_, int kRows_, int kCluster_>
struct WideBsr {
  using T = T_;
  using Ring = WideRing<T, kRows_, kCluster_, true>;
  static constexpr int kRows = kRows_, kCluster = kCluster_, kStageBytes = Ring::kStageBytes;
  static constexpr int kHalves = 2, kBlockBytes = kHalves * kStageBytes;  // of a row of a block
  static constexpr int kParts = 4;                                        // tiles that the fetching warp may be ahead
  static constexpr unsigned kPartReaders = Ring::kReaders + kCluster;     // those who fetch, too
  // shared memory behind the ring, in bytes
  static constexpr int kPart = Ring::kEnd;
  static constexpr int kPartBarriers = kPart + kParts * static_cast<int>(sizeof(WideBsrPart));
  static constexpr int kOrder = kPartBarriers + (2 * kParts + 1) * static_cast<int>(sizeof(TileBarrier));
  static constexpr size_t kShared = kOrder + kMaxSortedStripes * sizeof(int32_t) + kSharedAlignment;
  static_assert(kPart % sizeof(WideBsrPart) == 0 && kShared <= (227 << 10), "more shared memory than a block gets");
};

template <class S>
struct WideBsrBlock {
  using T = typename S::T;
  using Part = WideBsrPart;
  const BsrProblem& p;
  typename S::Ring ring;

  __device__ TileBarrier* part_full(int slot) const {
    return reinterpret_cast<TileBarrier*>(ring.shared + S::kPartBarriers) + slot;
  }
  // in the cluster's first block alone
  __device__ TileBarrier* part_empty(int slot) const { return part_full(S::kParts + slot); }
  __device__ TileBarrier* wanted() const { return part_full(2 * S::kParts); }
  __device__ Part* part(int slot) const { return reinterpret_cast<Part*>(ring.shared + S::kPart) + slot; }
  __device__ int32_t* order() const { return reinterpret_cast<int32_t*>(ring.shared + S::kOrder); }
  __device__ int32_t* lengths() const { return reinterpret_cast<int32_t*>(ring.y()); }  // before the first tile

  // Whether the block draws the cluster's tiles.
  __device__ static bool draws() { return S::kCluster == 1 || cluster_rank() == 0; }

  __device__ int stripes() const { return (p.channels - 1) / kWideChannels + 1; }
  __device__ int row_tiles() const { return (p.x.rows - 1) / (S::kCluster * S::kRows) + 1; }  // of a cluster
  __device__ int unsorted() const { return stripes() > kMaxSortedStripes ? stripes() - kMaxSortedStripes : 0; }

  // A stripe without blocks has a stage from beyond the matrices, which is zeros.
  __device__ static int stages(const Part& of) { return of.blocks > 0 ? of.blocks * S::kHalves : 1; }

  // By one thread.
  __device__ void initialize() const {
    ring.initialize();
    for (int slot = 0; slot < S::kParts; ++slot) {
      tile_barrier_init(part_full(slot), 1);
      tile_barrier_init(part_empty(slot), S::kPartReaders);
    }
    tile_barrier_init(wanted(), 1);
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
  }

  __device__ int stripe_at(int place) const {
    return place < unsorted() ? place : load(order() + (place - unsorted()));
  }

  // By one thread: the cluster's next tile, and none is there from the number of tiles on. Each cluster has its first
  // tile without a ticket, so that of as many tickets as tiles the last one is drawn. Tickets order nothing else.
  __device__ int next_tile(int tiles) const {
    const auto ticket = static_cast<int>(atomic_add(p.ticket, 1u));
    if (ticket == tiles - 1) atomic_exchange(p.ticket, 0u);
    return ticket + static_cast<int>(gridDim.x) / S::kCluster;
  }

  // By one thread of the cluster, to all its blocks: other rows for each.
  __device__ void pass(RingPlace& to, Part next) const {
    tile_barrier_wait(part_empty(to.slot), to.turn ^ 1);
    if constexpr (S::kCluster == 1) {
      store(part(to.slot), next);
      tile_barrier_arrive(part_full(to.slot));
    } else {
#pragma unroll
      for (unsigned rank = 0; rank < S::kCluster; ++rank, next.row += S::kRows) {
        store_remote(part(to.slot), rank, next);
      }
#pragma unroll
      for (unsigned rank = 0; rank < S::kCluster; ++rank) tile_barrier_arrive_remote(part_full(to.slot), rank);
    }
    to.advance(S::kParts);
  }

  // By one thread of the cluster: its tiles, each when the last block of the one before is fetched.
  __device__ void draw() const {
    const int across = stripes(), down = row_tiles(), tiles = across * down;
    RingPlace to;
    int i = static_cast<int>(blockIdx.x) / S::kCluster;
#pragma unroll 1
    for (unsigned turn = 0; i < tiles; turn ^= 1) {
      const TileOf tile(i, across, down);
      const int stripe = stripe_at(tile.channel), first = load(p.starts + stripe);
      const int end = load(p.starts + stripe + 1);
      pass(to, {tile.row * (S::kCluster * S::kRows), stripe * kWideChannels, first, end - first});
      tile_barrier_wait(wanted(), turn);
      i = next_tile(tiles);
    }
    pass(to, {0, 0, 0, Part::kNoMore});
  }

  // By each warp that multiplies, and by the thread that fetches.
  __device__ Part take(RingPlace& from, bool alone = false) const {
    TileBarrier *const full = part_full(from.slot), *const empty = part_empty(from.slot);
    S::kCluster == 1 ? tile_barrier_wait(full, from.turn) : tile_barrier_wait_remote(full, from.turn);
    const Part next = load(part(from.slot));
    if (!alone) __syncwarp();
    if (threadIdx.x % 32 == 0) S::kCluster == 1 ? tile_barrier_arrive(empty) : tile_barrier_arrive(empty, 0);
    from.advance(S::kParts);
    return next;
  }

  // By one thread.
  __device__ void want() const {
    if (draws()) tile_barrier_arrive(wanted());
  }

  // By one thread.
  __device__ void fetch(const WideBsrMaps& maps) const {
    RingPlace at, from;
#pragma unroll 1
    for (Part next = take(from, true); next.blocks != Part::kNoMore; next = take(from, true)) {
      if (next.blocks == 0) {
        want();
        ring.fetch(at, maps.values, {0, kBeyond}, maps.x, {0, kBeyond});
        continue;
      }
      const int end = next.first + next.blocks;
      int column = load(p.columns + next.first);
#pragma unroll 1
      for (int block = next.first; block < end; ++block) {
        const int byte = column * S::kBlockBytes;
        if (block + 1 < end) {
          column = load(p.columns + block + 1);
        } else {
          want();
        }
#pragma unroll
        for (int half = 0; half < S::kBlockBytes; half += S::kStageBytes) {
          ring.fetch(at, maps.values, {half, block * kWideChannels}, maps.x, {byte + half, next.row});
        }
      }
    }
  }

  // By a warpgroup: y of its channels, tile after tile.
  __device__ void multiply_all(const WideBsrMaps& maps) const {
    RingPlace at, from;
    float sum[S::kRows / 2];
    Part next = take(from);
    ring.stagger(stages(next));
#pragma unroll 1
    for (; next.blocks != Part::kNoMore; next = take(from)) {
      const int channel = next.channel + multiplier() * 64;
      float bias[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int own = channel + warp_channel() + static_cast<int>(threadIdx.x % 32) / 4 + i * 8;
        if (p.bias != nullptr && own < p.channels) bias[i] = load_as_float(p.bias, own, p.bias_format);
      }
      const int last = ring.multiply(at, stages(next), sum);
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
    if (block.draws()) block.sort();
    S::kCluster == 1 ? __syncthreads() : cluster_barrier();
    if (threadIdx.x < kWarpgroup) {
      warpgroup_registers<40, false>();
      if (threadIdx.x == 0) block.fetch(maps);
      if (threadIdx.x == 32 && block.draws()) block.draw();
    } else {
      warpgroup_registers<kMultiplierRegisters<40>, true>();
      block.multiply_all(maps);
    }
    if constexpr (S::kCluster > 1) {
      __syncwarp();
      cluster_barrier();  // until the other block neither copies here nor arrives
    }
  }
}

}  // namespace burnish
