// The ring of a dense product of wide.cuh: a stage is 64 columns, of 16 bits, of W and of x.
#pragma once

#include "cuda/warpgroup.cuh"
#include "cuda/wide.cuh"

namespace burnish {

// In shared memory: x, W, y's places, the barriers; from kEnd on what a kernel needs besides.
// kCluster_: neighbours that take the same rows of x, or the same channels of W where kSharesW_, of which each fetches
// a part.
template <class T_, int kRows_, int kCluster_ = 1, bool kSharesW_ = false>
struct WideRing {
  using T = T_;
  static constexpr int kRows = kRows_, kCluster = kCluster_;
  static constexpr bool kSharesW = kCluster > 1 && kSharesW_, kSharesX = kCluster > 1 && !kSharesW_;
  static constexpr int kStages = kRows == 256 ? 4 : 6;
  static constexpr int kStageBytes = 128;  // of a row
  static constexpr int kSteps = 4;         // instructions deep
  static constexpr int kX = 0, kW = kX + kStages * kRows * kStageBytes;
  static constexpr int kY = kW + kStages * kWideChannels * kStageBytes;
  static constexpr int kBarriers = kY + kYPlaces;
  static constexpr int kEnd = kBarriers + 2 * kStages * static_cast<int>(sizeof(TileBarrier));
  static constexpr unsigned kReaders = 8 * kCluster;  // the warps that say when a stage may be overwritten
  // fetched at a time
  static constexpr int kXRows = kSharesX ? kRows / kCluster : kRows;
  static constexpr int kWRows = kSharesW ? kWideChannels / kCluster : kWideChannels;

  unsigned char* shared;

  __device__ TileBarrier* full(int slot) const { return reinterpret_cast<TileBarrier*>(shared + kBarriers) + slot; }
  __device__ TileBarrier* empty(int slot) const { return full(kStages + slot); }
  __device__ unsigned char* x(int slot) const { return shared + kX + slot * (kRows * kStageBytes); }
  __device__ unsigned char* W(int slot) const { return shared + kW + slot * (kWideChannels * kStageBytes); }
  __device__ unsigned char* y() const { return shared + kY; }

  // By one thread, which has to call tile_barriers_ready; then the cluster has to meet, and again at the end.
  __device__ void initialize() const {
    for (int slot = 0; slot < kStages; ++slot) {
      tile_barrier_init(full(slot), 1);
      tile_barrier_init(empty(slot), kReaders);
    }
  }

  struct Corner {
    int byte, row;
  };

  // By one thread: a tile of so many rows, or the block's part of what the cluster shares.
  template <bool kShared, int kTileRows>
  __device__ void load_part(unsigned char* to, const TileMap& map, Corner from, TileBarrier* arrival) const {
    if constexpr (kShared) {
      const int first = static_cast<int>(cluster_rank()) * kTileRows;
      load_tile_to_all<kCluster>(to + first * kStageBytes, map, from.byte, from.row + first, arrival);
    } else {
      load_tile(to, map, from.byte, from.row, arrival);
    }
  }

  // By one thread: the tiles that start there.
  __device__ void fetch(RingPlace& at, const TileMap& left, Corner of_W, const TileMap& right, Corner of_x) const {
    tile_barrier_wait(empty(at.slot), at.turn ^ 1);
    tile_barrier_expect(full(at.slot), (kWideChannels + kRows) * kStageBytes);
    load_part<kSharesW, kWRows>(W(at.slot), left, of_W, full(at.slot));
    load_part<kSharesX, kXRows>(x(at.slot), right, of_x, full(at.slot));
    at.advance(kStages);
  }

  // By a warpgroup, before its first tile, which has so many stages: the second one begins kLag behind the first, so
  // that one multiplies while the other writes.
  __device__ void stagger(int stages) const {
    constexpr int kLag = 2;
    if (multiplier() == 1 && stages > kLag) tile_barrier_wait(full(kLag), 0);
  }

  // By a warpgroup: one of a stage's products.
  __device__ void multiply_step(float (&sum)[kRows / 2], int slot, int step, bool add) const {
    const unsigned char* a = W(slot) + multiplier() * (64 * kStageBytes) + step * 32;
    warpgroup_mma<T>(sum, shared_tile<Swizzle::k128>(a), shared_tile<Swizzle::k128>(x(slot) + step * 32), add);
  }

  // By a warpgroup: the sums of its 64 channels over at least one stage. The last one is under way when this returns:
  // its slot, which is to be released after warpgroup_wait<0>.
  __device__ int multiply(RingPlace& at, int stages, float (&sum)[kRows / 2]) const {
    int before = 0;  // the slot of the stage before
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      tile_barrier_wait(full(at.slot), at.turn);
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply_step(sum, at.slot, step, stage > 0 || step > 0);
      warpgroup_commit();
      warpgroup_wait<1>();
      if (stage > 0) release(before);
      before = at.slot;
      at.advance(kStages);
    }
    return before;
  }

  // By each warp: what its products have read of a stage may be overwritten.
  __device__ void release(int slot) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (kCluster == 1) {
      if (lane == 0) tile_barrier_arrive(empty(slot));
    } else if (lane < kCluster) {
      tile_barrier_arrive(empty(slot), lane);
    }
  }
};

}  // namespace burnish
