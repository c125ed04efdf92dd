// lora_linear for many rows on sm_90a, with a base of x's type: y^T = W x^T + bias + B s^T, s = factor (keep * x) A^T,
// by products of whole warpgroups. s has its own warps, which work while the blocks' first tiles are multiplied.
//
// All blocks run at the same time. Two are a cluster and take tile after tile of 128 channels each by the same kRows
// rows of x, of which each fetches half for both. Each also takes chunk after chunk of kLowRows rows of s. A block's
// warps:
//
//   0        fetches: a stage is 64 columns of W and x; the last stage of a tile is B and s, which wait for all blocks'
//            chunks of s; the ring runs on from tile to tile
//   1, 2     multiply x by A, 16 rows each, for the block's chunks of s
//   3        fetches for them, into a ring in y's place, which is empty until the first tile is done
//   4 to 11  two warpgroups of 64 channels each multiply, and write while the next tile is fetched
//
// A chunk for each block is what 4096 rows give 132 multiprocessors: s then costs reading x, and A for each block, once
// more, from L2 mostly, and products that are 1 / 32 of those of a tile of 256 rows for each 16 ranks. That is done
// before the tile is. A stage for B and s adds one product in four to a tile for each 16 ranks: at K = 4096 0.4 %.
#pragma once

#include "cuda/lowrank.cuh"
#include "cuda/warpgroup.cuh"
#include "cuda/wide_ring.cuh"

namespace burnish {

constexpr int kMaxWideRank = 64;  // burnish/ops/lora_linear.py knows it too

template <class T_, int kRows_>
struct WideLora {
  using T = T_;
  static constexpr int kCluster = 2, kTileChannels = kCluster * kWideChannels;
  using Ring = WideRing<T, kRows_, kCluster>;
  static constexpr int kRows = kRows_, kStageBytes = Ring::kStageBytes;
  static constexpr int kLowRows = 32, kMaxLowStages = 8;
  // shared memory behind the ring, in bytes
  static constexpr int kLowBarriers = Ring::kEnd, kBarrierCount = 2 * kMaxLowStages + 1;
  static constexpr int kArrival = kLowBarriers + kBarrierCount * static_cast<int>(sizeof(TileBarrier));
  static constexpr size_t kShared = kArrival + sizeof(uint32_t) + kSharedAlignment;
  static_assert(kShared <= (227 << 10), "more shared memory than a block gets");
  static constexpr unsigned kLowReaders = 2;  // the warps of s
  static constexpr unsigned kLow = 3;         // their barrier; 1 and 2 are the warpgroups'
};

struct WideLoraMaps {
  TileMap x, W, s, B;  // of the ring
  TileMap low_x, A;    // of s's ring
  TileMap y;
};

template <class S>
struct WideLoraBlock {
  using T = typename S::T;
  const LowRankProblem& p;
  T* low;  // s, [rows, rank]; ranks are whole eights
  typename S::Ring ring;

  __device__ TileBarrier* barrier(int i) const {
    return reinterpret_cast<TileBarrier*>(ring.shared + S::kLowBarriers) + i;
  }
  __device__ TileBarrier* low_full(int slot) const { return barrier(slot); }
  __device__ TileBarrier* low_empty(int slot) const { return barrier(S::kMaxLowStages + slot); }
  __device__ TileBarrier* arrived() const { return barrier(S::kBarrierCount - 1); }
  __device__ uint32_t* arrival() const { return reinterpret_cast<uint32_t*>(ring.shared + S::kArrival); }

  __device__ unsigned char* low_x(int slot) const { return ring.y() + slot * low_stage_bytes(); }
  __device__ unsigned char* A(int slot) const { return low_x(slot) + S::kLowRows * S::kStageBytes; }

  __device__ int stages() const { return (p.x.width - 1) / S::kStageBytes + 1; }
  __device__ int low_stage_bytes() const { return (S::kLowRows + p.rank) * S::kStageBytes; }
  __device__ int low_stages() const {
    const int fitting = kYPlaces / low_stage_bytes();
    return fitting < S::kMaxLowStages ? fitting : S::kMaxLowStages;
  }

  // By one thread.
  __device__ void initialize() const {
    ring.initialize();
    for (int slot = 0; slot < S::kMaxLowStages; ++slot) {
      tile_barrier_init(low_full(slot), 1);
      tile_barrier_init(low_empty(slot), S::kLowReaders);
    }
    tile_barrier_init(arrived(), 1);
    tile_barriers_ready();
  }

  // body(tile) for the block's tiles, in order.
  template <class Body>
  __device__ void each_tile(const Body& body) const {
    each_wide_tile(p.B.rows, S::kTileChannels, p.x.rows, S::kRows, S::kCluster, body);
  }

  __device__ static int first_channel(const TileOf& tile) {
    return tile.channel * S::kTileChannels + static_cast<int>(cluster_rank()) * kWideChannels;
  }

  // body(first row) for the block's chunks of s.
  template <class Body>
  __device__ void each_chunk(const Body& body) const {
#pragma unroll 1
    for (int row = static_cast<int>(blockIdx.x) * S::kLowRows; row < p.x.rows;
         row += static_cast<int>(gridDim.x) * S::kLowRows) {
      body(row);
    }
  }

  // By one thread.
  __device__ void fetch(const WideLoraMaps& maps) const {
    RingPlace at;
    bool collected = false;
    each_tile([&](const TileOf& tile) {
      const int row = tile.row * S::kRows, channel = first_channel(tile);
#pragma unroll 1
      for (int stage = 0; stage < stages(); ++stage) {
        const int byte = stage * S::kStageBytes;
        ring.fetch(at, maps.W, {byte, channel}, maps.x, {byte, row});
      }
      if (!collected) {
        tile_barrier_wait(arrived(), 0);
        grid_wait(p.counter, load(arrival()));
        copies_see_global_stores();
        collected = true;
      }
      ring.fetch(at, maps.B, {0, channel}, maps.s, {0, row});
    });
  }

  // By one thread.
  __device__ void fetch_low(const WideLoraMaps& maps) const {
    RingPlace at;
    each_chunk([&](int row) {
#pragma unroll 1
      for (int stage = 0; stage < stages(); ++stage) {
        tile_barrier_wait(low_empty(at.slot), at.turn ^ 1);
        tile_barrier_expect(low_full(at.slot), low_stage_bytes());
        load_tile(low_x(at.slot), maps.low_x, stage * S::kStageBytes, row, low_full(at.slot));
        load_tile(A(at.slot), maps.A, stage * S::kStageBytes, 0, low_full(at.slot));
        at.advance(low_stages());
      }
    });
  }

  // A unit of a line of 128 bytes in a tile.
  static __device__ Bytes16* unit_of(unsigned char* tile, int line, int unit) {
    return reinterpret_cast<Bytes16*>(tile + line * S::kStageBytes + (unit ^ line % 8) * 16);
  }

  // Zeros where x drops out, in the warp's 16 rows of a stage.
  __device__ void drop_out(uint64_t seed, unsigned char* tile, int first_line, int first_row, int stage) const {
    constexpr int kUnits = S::kStageBytes / 16;
#pragma unroll 2
    for (int turn = 0; turn < 16 * kUnits / 32; ++turn) {
      const int i = turn * 32 + static_cast<int>(threadIdx.x % 32);
      const int line = first_line + i / kUnits, group = stage * kUnits + i % kUnits;
      const uint32_t kept = kept_bits(dropout_words(seed, first_row + line, group), p.threshold);
      Bytes16* const slot = unit_of(tile, line, i % kUnits);
      Bytes16 unit = load(slot);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if ((kept >> e & 1) == 0) unit.word[e / 2] &= ~(0xffffu << e % 2 * 16);
      }
      store(slot, unit);
    }
    copies_see_stores();
    __syncwarp();
  }

  // By the two warps of s.
  __device__ void multiply_low() const {
    constexpr int kTiles = kMaxWideRank / 8;
    const int lane = static_cast<int>(threadIdx.x % 32), line = (static_cast<int>(threadIdx.x) / 32 - 1) * 16;
    const uint64_t seed = p.seed != nullptr ? static_cast<uint64_t>(load(p.seed)) : 0;
    RingPlace at;
    each_chunk([&](int row) {
      float sum[kTiles][4] = {};
#pragma unroll 1
      for (int stage = 0; stage < stages(); ++stage) {
        tile_barrier_wait(low_full(at.slot), at.turn);
        unsigned char *const rows = low_x(at.slot), *const ranks = A(at.slot);
        if (p.seed != nullptr) drop_out(seed, rows, line, row, stage);
#pragma unroll
        for (int step = 0; step < S::Ring::kSteps; ++step) {
          uint32_t a[4];
          load_matrix(a, unit_of(rows, line + lane % 16, step * 2 + lane / 16));
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            if (j * 8 >= p.rank) break;
            uint32_t b[2];
            load_matrix(b, unit_of(ranks, j * 8 + lane % 8, step * 2 + lane / 8 % 2));
            mma<T>(sum[j], a, b);
          }
        }
        __syncwarp();
        if (lane == 0) tile_barrier_arrive(low_empty(at.slot));
        at.advance(low_stages());
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j * 8 >= p.rank) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int own = row + line + half * 8 + lane / 4, rank = j * 8 + lane % 4 * 2;
          if (own >= p.x.rows) continue;
          const float first = p.factor * sum[j][half * 2], second = p.factor * sum[j][half * 2 + 1];
          store(reinterpret_cast<uint32_t*>(low + (static_cast<int64_t>(own) * p.rank + rank)),
                std::is_same_v<T, bf16> ? pack_bf16(first, second) : pack_fp16(first, second));
        }
      }
    });
    copies_see_global_stores();
    barrier_sync(S::kLow, 32 * S::kLowReaders);
    if (threadIdx.x == 32) {
      store(arrival(), grid_arrive(p.counter));
      tile_barrier_arrive(arrived());
    }
  }

  // By a warpgroup: the sums of its 64 channels.
  __device__ void multiply(RingPlace& at, float (&sum)[S::kRows / 2]) const {
    const int before = ring.multiply(at, stages(), sum);
    tile_barrier_wait(ring.full(at.slot), at.turn);
#pragma unroll 1
    for (int step = 0; step * 16 < p.rank; ++step) {
      warpgroup_fence();
      ring.multiply_step(sum, at.slot, step, true);
      warpgroup_commit();
    }
    warpgroup_wait<0>();
    ring.release(before);
    ring.release(at.slot);
    at.advance(S::Ring::kStages);
  }

  // By a warpgroup: y of its channels.
  __device__ void write(const WideLoraMaps& maps, const TileOf& tile, const float (&sum)[S::kRows / 2]) const {
    const int channel = first_channel(tile) + multiplier() * 64;
    float bias[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = channel + warp_channel() + static_cast<int>(threadIdx.x % 32) / 4 + i * 8;
      if (p.bias != nullptr && own < p.B.rows) bias[i] = load_as_float(p.bias, own, p.bias_format);
    }
    const auto finish = [&](float total, int, int i) { return p.bias != nullptr ? total + bias[i] : total; };
    write_wide(maps.y, ring.y(), tile.row * S::kRows, channel, std::is_same_v<T, bf16>, sum, finish);
  }
};

template <class S>
__global__ void __launch_bounds__(kWideBlock, 1)
    lora_linear_fwd_kernel_wide(LowRankProblem p, typename S::T* low, const __grid_constant__ WideLoraMaps maps) {
  if constexpr (kHasWarpgroups) {
    const WideLoraBlock<S> block{p, low, {aligned_shared_memory<unsigned char>()}};
    if (threadIdx.x == 0) block.initialize();
    cluster_barrier();
    if (threadIdx.x < kWarpgroup) {
      warpgroup_registers<120, false>();
      const int warp = static_cast<int>(threadIdx.x) / 32;
      if (warp == 1 || warp == 2) block.multiply_low();
      if (threadIdx.x == 0) block.fetch(maps);
      if (threadIdx.x == 96) block.fetch_low(maps);
    } else {
      warpgroup_registers<kMultiplierRegisters<120>, true>();
      RingPlace at;
      float sum[S::kRows / 2];
      block.ring.stagger(block.stages() + 1);
      block.each_tile([&](const TileOf& tile) {
        block.multiply(at, sum);
        block.write(maps, tile, sum);
      });
      if (threadIdx.x % kWarpgroup == 0) store_tile_wait<0>();
    }
    __syncwarp();
    cluster_barrier();  // until the other block neither copies here nor arrives
  }
}

}  // namespace burnish
