// A small product of sm_90a's parts, right as it is and wrong in one way on request: y[256][64] = x[256][K] *
// w[64][K]^T of which w keeps the two middle values of every four, 128 rows of y at a time. One warp copies a ring of
// two stages to shared memory, a warpgroup multiplies what arrives, and stores y by way of one buffer of 64 rows.
#include "cuda/warpgroup.cuh"
#include "math/half.h"
#include "planted.cuh"

namespace burnish {
namespace {

enum class Bug : int {
  kNone,
  kNoInit,
  kNotReady,
  kNoBarrierAfterInit,
  kMisalignedTile,
  kLineWithinUnit,
  kNoEmptyWait,
  kNoFullWait,
  kWrongFullParity,
  kWrongEmptyParity,
  kFewBytes,
  kManyBytes,
  kFewArrivals,
  kManyArrivals,
  kEarlyRelease,
  kNoReleaseOfLast,
  kNoFence,
  kNoCommit,
  kEarlySums,
  kProductsUnderWay,
  kDifferentTiles,
  kNoCopiesSeeStores,
  kNoBarrierBeforeStore,
  kNoStoreWait,
  kNoBarrierAfterStoreWait,
  kNoStoreCommit,
  kStoresUnderWay,
};

constexpr int kRows = 128, kChannels = 64, kStages = 2, kTiles = 2, kSteps = 4, kOutRows = 64, kThreads = 160;
constexpr int kXLine = 128, kValueLine = 64, kOutLine = 128;
constexpr int kX = 0, kValues = kX + kStages * kRows * kXLine, kOut = kValues + kStages * kChannels * kValueLine;
constexpr int kBarriers = kOut + kOutRows * kOutLine;
constexpr size_t kShared = kBarriers + 2 * kStages * sizeof(TileBarrier) + kSharedAlignment;
constexpr uint32_t kKept = 0x99999999;  // places 1 and 2 of every four
constexpr unsigned kWarps = kWarpgroup / 32;

struct Maps {
  TileMap x, values, y;
};

struct Ring {
  unsigned char* shared;
  Bug bug;

  __device__ TileBarrier* full(int slot) const { return reinterpret_cast<TileBarrier*>(shared + kBarriers) + slot; }
  __device__ TileBarrier* empty(int slot) const { return full(kStages + slot); }
  __device__ unsigned char* x(int slot) const {
    return shared + kX + slot * kRows * kXLine + (bug == Bug::kMisalignedTile ? 512 : 0);
  }
  __device__ unsigned char* values(int slot) const { return shared + kValues + slot * kChannels * kValueLine; }

  __device__ void init() const {
    for (int slot = 0; slot < kStages; ++slot) {
      if (bug != Bug::kNoInit || slot == 0) tile_barrier_init(full(slot), 1);
      tile_barrier_init(empty(slot), kWarps);
    }
    if (bug != Bug::kNotReady) tile_barriers_ready();
  }

  // By one thread.
  __device__ void fetch(const Maps& maps) const {
    for (int stage = 0; stage < kTiles * kSteps; ++stage) {
      const int slot = stage % kStages, step = stage % kSteps;
      const unsigned turn = stage / kStages % 2;
      if (bug != Bug::kNoEmptyWait) tile_barrier_wait(empty(slot), bug == Bug::kWrongEmptyParity ? turn : turn ^ 1);
      constexpr unsigned kBytes = kRows * kXLine + kChannels * kValueLine;
      tile_barrier_expect(full(slot), bug == Bug::kFewBytes    ? kBytes - kChannels * kValueLine
                                      : bug == Bug::kManyBytes ? kBytes + 16
                                                               : kBytes);
      load_tile(values(slot), maps.values, step * kValueLine, 0, full(slot));
      load_tile(x(slot), maps.x, step * kXLine + (bug == Bug::kLineWithinUnit ? 8 : 0), stage / kSteps * kRows,
                full(slot));
    }
  }

  __device__ void release(int slot) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 != 0 || (bug == Bug::kFewArrivals && warp == 2)) return;
    tile_barrier_arrive(empty(slot));
    if (bug == Bug::kManyArrivals && warp == 2) tile_barrier_arrive(empty(slot));
  }

  // By the warpgroup, like what follows.
  __device__ void multiply(int tile, float (&sum)[kRows / 2]) const {
    for (int step = 0; step < kSteps; ++step) {
      const int stage = tile * kSteps + step, slot = stage % kStages, before = (stage + kStages - 1) % kStages;
      const unsigned turn = stage / kStages % 2;
      if (bug != Bug::kNoFullWait) tile_barrier_wait(full(slot), bug == Bug::kWrongFullParity ? turn ^ 1 : turn);
      const unsigned char *a = values(slot), *b = x(slot);
      if (bug == Bug::kDifferentTiles && threadIdx.x % 32 == 7) a = values(before);
      if (bug != Bug::kNoFence) warpgroup_fence();
      warpgroup_mma_sparse<bf16>(sum, shared_tile<Swizzle::k64>(a), shared_tile<Swizzle::k128>(b), kKept, step > 0);
      warpgroup_mma_sparse<bf16, 1>(sum, shared_tile<Swizzle::k64>(a + kValueLine / 2),
                                    shared_tile<Swizzle::k128>(b + kXLine / 2), kKept, true);
      if (bug != Bug::kNoCommit) warpgroup_commit();
      if (bug == Bug::kEarlyRelease) {
        release(slot);
        warpgroup_wait<1>();
        continue;
      }
      warpgroup_wait<1>();
      if (step > 0) release(before);
    }
    if (bug == Bug::kProductsUnderWay && tile + 1 == kTiles) return;
    if (bug != Bug::kEarlySums) warpgroup_wait<0>();
    if (bug != Bug::kEarlyRelease && bug != Bug::kNoReleaseOfLast) release((tile * kSteps + kSteps - 1) % kStages);
    if (bug == Bug::kEarlySums && tile + 1 == kTiles) warpgroup_wait<0>();
  }

  __device__ void write(const Maps& maps, int tile, const float (&sum)[kRows / 2]) const {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    unsigned char* const out = shared + kOut;
    for (int row = 0; row < kRows; row += kOutRows) {
      if (threadIdx.x == 0 && bug != Bug::kNoStoreWait) store_tile_wait<0>();
      if (bug != Bug::kNoBarrierAfterStoreWait) barrier_sync(1, kWarpgroup);
      for (int pair = 0; pair < kOutRows; pair += 16) {
        uint32_t tiles[4];
        for (int i = 0; i < 4; ++i) {
          const float* two = sum + (row + pair + i / 2 * 8) / 2 + i % 2 * 2;
          tiles[i] = pack_fp16(two[0], two[1]);
        }
        const int line = pair + lane / 16 * 8 + lane % 8, unit = warp * 2 + lane / 8 % 2;
        store_matrix_transposed(out + line * kOutLine + (unit ^ line % 8) * 16, tiles);
      }
      if (bug != Bug::kNoCopiesSeeStores) copies_see_stores();
      if (bug != Bug::kNoBarrierBeforeStore) barrier_sync(2, kWarpgroup);
      if (threadIdx.x != 0) continue;
      store_tile(maps.y, out, 0, tile * kRows + row);
      if (bug != Bug::kNoStoreCommit) store_tile_commit();
    }
  }
};

__global__ void __launch_bounds__(kThreads) ring_kernel(const __grid_constant__ Maps maps, Bug bug) {
  const Ring ring{aligned_shared_memory<unsigned char>(), bug};
  if (threadIdx.x == 0) ring.init();
  if (bug != Bug::kNoBarrierAfterInit) __syncthreads();
  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x == kWarpgroup) ring.fetch(maps);
    return;
  }
  float sum[kRows / 2];
  for (int tile = 0; tile < kTiles; ++tile) {
    ring.multiply(tile, sum);
    ring.write(maps, tile, sum);
  }
  if (threadIdx.x == 0 && bug != Bug::kStoresUnderWay) store_tile_wait<0>();
}

void run(const char*, const Call& c) {
  constexpr int kXWidth = kSteps * kXLine, kValueWidth = kSteps * kValueLine;
  const Maps maps{tile_map({c.a, kTiles * kRows, kXWidth, kXWidth, kRows, kXLine, Swizzle::k128}),
                  tile_map({c.b, kChannels, kValueWidth, kValueWidth, kChannels, kValueLine, Swizzle::k64}),
                  tile_map({c.y, kTiles * kRows, kOutLine, kOutLine, kOutRows, kOutLine, Swizzle::k128})};
  launch(ring_kernel, dim3(1), dim3(kThreads), kShared, nullptr, maps, c.bug);
}

}  // namespace
}  // namespace burnish
