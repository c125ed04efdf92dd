// lowrank_linear for many rows on sm_90a: s = x A^T and y^T = B s^T + bias by products of whole warpgroups, x read
// once, y written once, and s never outside of shared memory.
//
// kSlices neighbours take tile after tile of kRows rows of x together. For each:
//
//   down      a block takes every kSlices-th 64 columns of x and A, a stage of its ring, and has a part of s in fp32
//   exchange  it leaves that in its shared memory; each block adds the parts of kRows / kSlices rows, always in the
//             same order, rounds them, once, and stores them as s in the memory of all
//   up        a block takes every kSlices-th 128 channels, whose B is a stage of the same ring, and has all of s
//
// A block's warps:
//
//   0        fetches: x and A, then B, of which what the ring holds is on its way before s is there
//   4 to 11  two warpgroups multiply. Down, each has half of the rows, or of the ranks where there are 64 rows; up, 64
//            channels. They write y while the other one multiplies, and while B is fetched
//
// A cluster has kTiles such tiles at a time. The blocks of a slice, one of each tile, multiply by the same A and B, of
// which each then fetches a part for all of them.
//
// After the second of the two barriers of an exchange no block touches the memory of another one before the next tile.
// So a cluster of one tile needs no barrier at its end; of more, one block may still give a stage back to another.
//
// What a block moves with M, N, K = 4096, tiles of 128 rows and four slices, hence 128 blocks: 256 KB of x and 256 KB
// of y by way of memory; for each 16 ranks 32 KB of A and 32 KB of B, from L2, which gives half of them where there are
// two tiles; and from the other blocks, for each 16 ranks, 6 KB of parts and 3 KB of s. Tensor cores multiply in 64
// clocks, or in 32 for 64 ranks, 16 columns of a warpgroup's rows down, and in 64 clocks 16 ranks of its channels up:
// each way that is at most 8192 clocks, 5 us, where memory takes 8.
#pragma once

#include "cuda/lowrank.cuh"
#include "cuda/warpgroup.cuh"
#include "cuda/wide.cuh"

namespace burnish {

constexpr int kMaxWideLowRank = 128;  // burnish/ops/lowrank_linear.py knows it too

// kRows: 64 or 128. kRanks: 64 or 128, at least as many as there are.
template <class T_, int kRows_, int kRanks_, int kSlices_, int kTiles_ = 1>
struct WideLowRank {
  using T = T_;
  static constexpr int kRows = kRows_, kRanks = kRanks_, kSlices = kSlices_, kTiles = kTiles_;
  static constexpr int kCluster = kSlices * kTiles;
  static constexpr int kLineBytes = 128;            // of x and A 64 columns, of s and B 64 ranks
  static constexpr int kSteps = 4;                  // instructions deep
  static constexpr int kHalves = kRanks / 64;       // lines of a row of s or B
  static constexpr int kOwnRows = kRows / kSlices;  // whose parts a block adds
  static constexpr unsigned kReaders = 8 * kTiles;  // the warps that say when a stage may be overwritten
  static constexpr unsigned kBoth = 3;              // the warpgroups' barrier; 1 and 2 are each one's
  static constexpr int kMultipliers = 2 * kWarpgroup;
  // what a warpgroup has of s
  static constexpr int kSumRanks = kRows == 128 ? kRanks : kRanks / 2;
  // shared memory, in bytes: s, the block's part of it, where later y has its places, the ring and its barriers
  static constexpr int kDownBytes = (kRows + kRanks) * kLineBytes;
  static constexpr int kUpBytes = kHalves * kWideChannels * kLineBytes;
  static constexpr int kStageBytes = kDownBytes > kUpBytes ? kDownBytes : kUpBytes;
  static constexpr int kPartBytes = kRows * kRanks * static_cast<int>(sizeof(float));
  static constexpr int kPart = kRows * kHalves * kLineBytes;
  static constexpr int kRing = kPart + (kPartBytes > kYPlaces ? kPartBytes : kYPlaces);
  static constexpr int kMost = (227 << 10) - static_cast<int>(kSharedAlignment);
  static constexpr int kBarrierBytes = 2 * static_cast<int>(sizeof(TileBarrier));  // of a stage
  static constexpr int kStages = (kMost - kRing) / (kStageBytes + kBarrierBytes);
  static constexpr int kBarriers = kRing + kStages * kStageBytes;
  static constexpr size_t kShared = kBarriers + kStages * kBarrierBytes + kSharedAlignment;
};

struct WideLowRankMaps {
  TileMap x, A, B, y;
};

template <class S>
struct WideLowRankBlock {
  using T = typename S::T;
  const LowRankProblem& p;
  unsigned char* shared;

  struct alignas(8) Pair {
    float value[2];
  };
  struct alignas(8) Rounded {
    uint32_t word[2];
  };

  __device__ TileBarrier* full(int slot) const { return reinterpret_cast<TileBarrier*>(shared + S::kBarriers) + slot; }
  __device__ TileBarrier* empty(int slot) const { return full(S::kStages + slot); }
  __device__ unsigned char* x(int slot) const { return shared + S::kRing + slot * S::kStageBytes; }
  __device__ unsigned char* A(int slot) const { return x(slot) + S::kRows * S::kLineBytes; }
  __device__ unsigned char* B(int slot, int half) const { return x(slot) + half * (kWideChannels * S::kLineBytes); }
  __device__ unsigned char* s(int half) const { return shared + half * (S::kRows * S::kLineBytes); }

  // Four ranks of a row of the block's part of s, exchanged so that a warp's pairs of eight rows are in all banks.
  __device__ Bytes16* part(int row, int four) const {
    return reinterpret_cast<Bytes16*>(shared + S::kPart) + row * (S::kRanks / 4) + (four ^ row % 4 * 2);
  }

  // The same of s.
  __device__ Rounded* rounded(int row, int four) const {
    unsigned char* const line = s(four / 16) + row * S::kLineBytes;
    return reinterpret_cast<Rounded*>(line + (four % 16 / 2 ^ row % 8) * 16) + four % 2;
  }

  // Which of its tile's blocks the block is, and which of the cluster's tiles is its own.
  __device__ static int slice() { return static_cast<int>(cluster_rank()) % S::kSlices; }
  __device__ static int tile() { return static_cast<int>(cluster_rank()) / S::kSlices; }

  // Of `all` stages, how many are the block's.
  __device__ static int own(int all) { return (all + S::kSlices - 1 - slice()) / S::kSlices; }
  __device__ int down_stages() const { return own((p.x.width - 1) / S::kLineBytes + 1); }
  __device__ int up_stages() const { return own((p.B.rows - 1) / kWideChannels + 1); }

  // Its i-th, of all.
  __device__ static int stage_at(int i) { return i * S::kSlices + slice(); }

  // By one thread.
  __device__ void initialize() const {
    for (int slot = 0; slot < S::kStages; ++slot) {
      tile_barrier_init(full(slot), 1);
      tile_barrier_init(empty(slot), S::kReaders);
    }
    tile_barriers_ready();
  }

  // body(first row) for the block's tiles, in order, of which the last ones may have no row.
  template <class Body>
  __device__ void each_tile(const Body& body) const {
    constexpr int kTogether = S::kTiles * S::kRows;
#pragma unroll 1
    for (int row = static_cast<int>(blockIdx.x) / S::kCluster * kTogether; row < p.x.rows;
         row += static_cast<int>(gridDim.x) / S::kCluster * kTogether) {
      body(row + tile() * S::kRows);
    }
  }

  // By one thread: as many lines of a factor, of which the blocks of a slice fetch a part each, for all of them.
  __device__ static void fetch_factor(unsigned char* to, const TileMap& map, int byte, int row, int lines,
                                      TileBarrier* barrier) {
    if constexpr (S::kTiles == 1) {
      load_tile(to, map, byte, row, barrier);
    } else {
      constexpr unsigned kFirstOfEach = ((1u << S::kCluster) - 1) / ((1u << S::kSlices) - 1);
      const int first = tile() * (lines / S::kTiles);
      load_tile_to(kFirstOfEach << slice(), to + first * S::kLineBytes, map, byte, row + first, barrier);
    }
  }

  // By one thread.
  __device__ void fetch_down(RingPlace& at, const WideLowRankMaps& maps, int row) const {
    const int stages = down_stages();
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      const int byte = stage_at(i) * S::kLineBytes;
      tile_barrier_wait(empty(at.slot), at.turn ^ 1);
      tile_barrier_expect(full(at.slot), S::kDownBytes);
      load_tile(x(at.slot), maps.x, byte, row, full(at.slot));
      fetch_factor(A(at.slot), maps.A, byte, 0, S::kRanks, full(at.slot));
      at.advance(S::kStages);
    }
  }

  // By one thread: the block's stages of B from number `first` to before `end`.
  __device__ void fetch_up(RingPlace& at, const WideLowRankMaps& maps, int first, int end) const {
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      tile_barrier_wait(empty(at.slot), at.turn ^ 1);
      tile_barrier_expect(full(at.slot), S::kUpBytes);
#pragma unroll
      for (int half = 0; half < S::kHalves; ++half) {
        fetch_factor(B(at.slot, half), maps.B, half * S::kLineBytes, stage_at(i) * kWideChannels, kWideChannels,
                     full(at.slot));
      }
      at.advance(S::kStages);
    }
  }

  // By the four warps that do not multiply. Before s is there the ring takes no more of B than it holds: what comes
  // after waits for products with s.
  __device__ void fetch(const WideLowRankMaps& maps) const {
    const bool fetches = threadIdx.x == 0;
    const int ups = up_stages(), ahead = ups < S::kStages ? ups : S::kStages;
    RingPlace at;
    each_tile([&](int row) {
      if (fetches) {
        fetch_down(at, maps, row);
        fetch_up(at, maps, 0, ahead);
      }
      __syncwarp();
      cluster_barrier();
      cluster_barrier();
      if (fetches) fetch_up(at, maps, ahead, ups);
      __syncwarp();
    });
  }

  // By each warp: what its products have read of a stage may be overwritten.
  __device__ void release(int slot) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (S::kTiles == 1) {
      if (lane == 0) tile_barrier_arrive(empty(slot));
    } else if (lane < S::kTiles) {
      tile_barrier_arrive(empty(slot), lane * S::kSlices + static_cast<unsigned>(slice()));
    }
  }

  __device__ static int first_row() { return S::kRows == 128 ? multiplier() * 64 : 0; }
  __device__ static int first_rank() { return S::kRows == 128 ? 0 : multiplier() * S::kSumRanks; }

  // By a warpgroup: 64 rows of kSumRanks ranks of the block's part of s; false where the block has no columns.
  __device__ bool multiply_down(RingPlace& at, float (&sum)[S::kSumRanks / 2]) const {
    const int stages = down_stages();
    int before = 0;  // the slot of the stage before
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      tile_barrier_wait(full(at.slot), at.turn);
      const unsigned char* rows = x(at.slot) + first_row() * S::kLineBytes;
      const unsigned char* ranks = A(at.slot) + first_rank() * S::kLineBytes;
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        warpgroup_mma<T>(sum, shared_tile<Swizzle::k128>(rows + step * 32),
                         shared_tile<Swizzle::k128>(ranks + step * 32), stage > 0 || step > 0);
      }
      warpgroup_commit();
      warpgroup_wait<1>();
      if (stage > 0) release(before);
      before = at.slot;
      at.advance(S::kStages);
    }
    warpgroup_wait<0>();
    if (stages > 0) release(before);
    return stages > 0;
  }

  // By both warpgroups: their sums to where all blocks find them, when y of the tile before has left that place.
  __device__ void leave(const float (&sum)[S::kSumRanks / 2], bool any) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (threadIdx.x % kWarpgroup == 0) store_tile_wait<0>();
    barrier_sync(S::kBoth, S::kMultipliers);
    const int row = first_row() + warp_channel() + lane / 4, first = first_rank() / 4 + lane % 4 / 2;
#pragma unroll
    for (int i = 0; i < S::kSumRanks / 8; ++i) {
      if (first_rank() + i * 8 >= p.rank) break;
      // four addresses, of which the others are multiples of 128 bytes away
      Bytes16* const four = part(row, first + i % 4 * 2) + i / 4 * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pair* const place = reinterpret_cast<Pair*>(four + half * 8 * (S::kRanks / 4)) + lane % 2;
        store(place, any ? Pair{{sum[i * 4 + half * 2], sum[i * 4 + half * 2 + 1]}} : Pair{});
      }
    }
  }

  // By both warpgroups: s of the block's rows, to all blocks. All that a thread needs is on its way before it adds.
  __device__ void exchange() const {
    constexpr int kTurns = (S::kOwnRows * (S::kRanks / 4) - 1) / S::kMultipliers + 1;
    const int fours = p.padded_rank / 4, first = slice() * S::kOwnRows;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
    const auto first_block = static_cast<unsigned>(tile()) * S::kSlices;
    Bytes16 parts[kTurns][S::kSlices] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = turn * S::kMultipliers + thread, four = i % fours;
      if (i >= S::kOwnRows * fours || four * 4 >= p.rank) continue;
#pragma unroll
      for (unsigned from = 0; from < S::kSlices; ++from) {
        parts[turn][from] = load_remote(part(first + i / fours, four), first_block + from);
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = turn * S::kMultipliers + thread;
      if (i >= S::kOwnRows * fours) continue;
      float total[4] = {};
#pragma unroll
      for (int from = 0; from < S::kSlices; ++from) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += bits_float(parts[turn][from].word[j]);
      }
      Rounded both;
#pragma unroll
      for (int j = 0; j < 2; ++j) both.word[j] = packed(total[j * 2], total[j * 2 + 1]);
#pragma unroll
      for (unsigned to = 0; to < S::kSlices; ++to) {
        store_remote(rounded(first + i / fours, i % fours), first_block + to, both);
      }
    }
    copies_see_remote_stores();
  }

  static constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  __device__ static uint32_t packed(float low, float high) {
    return kIsBf16 ? pack_bf16(low, high) : pack_fp16(low, high);
  }

  // By a warpgroup: y of the tile's rows and its 64 of each 128 channels.
  __device__ void multiply_up(RingPlace& at, const WideLowRankMaps& maps, int row) const {
    const int stages = up_stages();
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      const int channel = stage_at(stage) * kWideChannels + multiplier() * 64;
      float bias[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int own = channel + warp_channel() + static_cast<int>(threadIdx.x % 32) / 4 + i * 8;
        if (p.bias != nullptr && own < p.B.rows) bias[i] = load_as_float(p.bias, own, p.bias_format);
      }
      float sum[S::kRows / 2];
      tile_barrier_wait(full(at.slot), at.turn);
#pragma unroll 1
      for (int step = 0; step * 16 < p.rank; ++step) {
        const int half = step / S::kSteps, byte = step % S::kSteps * 32;
        const unsigned char* channels = B(at.slot, half) + multiplier() * (64 * S::kLineBytes) + byte;
        warpgroup_fence();
        warpgroup_mma<T>(sum, shared_tile<Swizzle::k128>(channels), shared_tile<Swizzle::k128>(s(half) + byte),
                         step > 0);
        warpgroup_commit();
      }
      warpgroup_wait<0>();
      release(at.slot);
      at.advance(S::kStages);
      const auto finish = [&](float total, int, int i) { return p.bias != nullptr ? total + bias[i] : total; };
      write_wide(maps.y, shared + S::kPart, row, channel, kIsBf16, sum, finish, stage * (S::kRows / kYRows));
    }
  }

  // By the two warpgroups.
  __device__ void multiply(const WideLowRankMaps& maps) const {
    RingPlace at;
    each_tile([&](int row) {
      float sum[S::kSumRanks / 2];
      const bool any = multiply_down(at, sum);
      leave(sum, any);
      cluster_barrier();
      exchange();
      cluster_barrier();
      copies_see_stores();  // those of the other blocks as well, which have fenced them on their side
      multiply_up(at, maps, row);
    });
    if (threadIdx.x % kWarpgroup == 0) store_tile_wait<0>();
  }
};

template <class S>
__global__ void __launch_bounds__(kWideBlock, 1)
    lowrank_linear_fwd_kernel_wide(LowRankProblem p, const __grid_constant__ WideLowRankMaps maps) {
  if constexpr (kHasWarpgroups) {
    const WideLowRankBlock<S> block{p, aligned_shared_memory<unsigned char>()};
    if (threadIdx.x == 0) block.initialize();
    S::kTiles == 1 ? __syncthreads() : cluster_barrier();
    if (threadIdx.x < kWarpgroup) {
      warpgroup_registers<40, false>();
      block.fetch(maps);
    } else {
      warpgroup_registers<kMultiplierRegisters<40>, true>();
      block.multiply(maps);
    }
    if constexpr (S::kTiles > 1) cluster_barrier();  // until no other block arrives here
  }
}

}  // namespace burnish
