// Two pairs of blocks, right as they are and wrong in one way on request: each block stores 16 words, all blocks wait
// for all, and each pair fetches the words of all, 16 by either block for both, through a place that is given back by
// both. y: [block][round][32] words, then the grid's counter.
#include "cuda/warpgroup.cuh"
#include "planted.cuh"

namespace burnish {
namespace {

enum class Bug : int {
  kNone,
  kNotTogether,
  kNoShow,
  kNoSyncwarp,
  kNoArrive,
  kNoGridWait,
  kNoBarrierAtEnd,
  kOwnBlockOnly,
  kHalfTheBytes,
  kGivenBackToOne,
};

constexpr int kWords = 16, kBlocks = 4, kRounds = 2, kThreads = 64, kLines = 4, kLine = 16, kHalf = 128;
constexpr int kBytes = kLines * kLine, kBarriers = 2 * kHalf, kBefore = kBarriers + 3 * sizeof(TileBarrier);
constexpr size_t kShared = kBefore + sizeof(uint32_t) + kSharedAlignment;

struct Pair {
  unsigned char* shared;
  uint32_t *words, *y;
  Bug bug;

  __device__ TileBarrier* barrier(int i) const { return reinterpret_cast<TileBarrier*>(shared + kBarriers) + i; }
  __device__ TileBarrier* full() const { return barrier(0); }
  __device__ TileBarrier* empty() const { return barrier(1); }
  __device__ TileBarrier* arrived() const { return barrier(2); }
  __device__ uint32_t* before() const { return reinterpret_cast<uint32_t*>(shared + kBefore); }
  __device__ uint32_t* counter() const { return y + kBlocks * kRounds * 2 * kWords; }

  __device__ void init() const {
    tile_barrier_init(full(), 1);
    tile_barrier_init(empty(), 2);
    tile_barrier_init(arrived(), 1);
    tile_barriers_ready();
  }

  // By a warp.
  __device__ void store_words(const uint32_t* a) const {
    const auto lane = static_cast<int>(threadIdx.x % 32), own = static_cast<int>(blockIdx.x) * kWords + lane;
    if (lane < kWords) store(words + own, load(a + own) + 1);
    if (bug != Bug::kNoShow) copies_see_global_stores();
    if (bug != Bug::kNoSyncwarp) __syncwarp();
    if (lane != 0) return;
    if (bug != Bug::kNoArrive || blockIdx.x != 1) store(before(), grid_arrive(counter()));
    tile_barrier_arrive(arrived());
  }

  // By a thread.
  __device__ void fetch(const TileMap& map) const {
    const auto rank = static_cast<int>(cluster_rank());
    tile_barrier_wait(arrived(), 0);
    if (bug != Bug::kNoGridWait) grid_wait(counter(), bug == Bug::kNoArrive ? 0 : load(before()));
    copies_see_global_stores();
    for (int round = 0; round < kRounds; ++round) {
      const int block = (static_cast<int>(blockIdx.x) + 2 * round + 1) % kBlocks;
      tile_barrier_wait(empty(), static_cast<unsigned>(round) ^ 1);
      tile_barrier_expect(full(), bug == Bug::kHalfTheBytes ? kBytes : 2 * kBytes);
      if (bug == Bug::kOwnBlockOnly) {
        load_tile(shared + rank * kHalf, map, 0, block * kLines, full());
      } else {
        load_tile_to_all<2>(shared + rank * kHalf, map, 0, block * kLines, full());
      }
    }
  }

  // By a warp.
  __device__ void take() const {
    const unsigned lane = threadIdx.x % 32;
    for (int round = 0; round < kRounds; ++round) {
      tile_barrier_wait(full(), static_cast<unsigned>(round));
      const unsigned char* from = shared + lane / kWords * kHalf + lane % kWords * 4;
      store(y + (static_cast<int>(blockIdx.x) * kRounds + round) * 2 * kWords + lane,
            load(reinterpret_cast<const uint32_t*>(from)));
      __syncwarp();
      if (lane < (bug == Bug::kGivenBackToOne ? 1u : 2u)) tile_barrier_arrive(empty(), lane);
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    pair_kernel(const __grid_constant__ TileMap map, const uint32_t* a, uint32_t* words, uint32_t* y, Bug bug) {
  const Pair pair{aligned_shared_memory<unsigned char>(), words, y, bug};
  if (threadIdx.x == 0) pair.init();
  cluster_barrier();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) pair.fetch(map);
  } else {
    pair.store_words(a);
    pair.take();
  }
  __syncwarp();
  if (bug != Bug::kNoBarrierAtEnd) cluster_barrier();
}

void run(const char*, const Call& c) {
  auto* words = c.out<uint32_t>(c.scratch);
  const TileMap map = tile_map({words, kBlocks * kLines, kLine, kLine, kLines, kLine, Swizzle::kNone});
  const auto* a = c.in<uint32_t>(c.a);
  auto* y = c.out<uint32_t>(c.y);
  if (c.bug == Bug::kNotTogether) {
    launch_cluster(pair_kernel, dim3(kBlocks), dim3(kThreads), 2, kShared, nullptr, map, a, words, y, c.bug);
  } else {
    launch_cooperative_clusters(pair_kernel, dim3(kBlocks), dim3(kThreads), 2, kShared, nullptr, map, a, words, y,
                                c.bug);
  }
}

}  // namespace
}  // namespace burnish
