// Every wrapper of warpgroup.cuh, each in a kernel of its own, as instructions.cu has those of ptx.cuh.
#include "cuda/warpgroup.cuh"
#include "instructions.cuh"

namespace burnish {

// What a kernel is told: the shape of a matrix in bytes and of a tile of it, or the parts of a product.
struct How {
  int rows, width, stride, tile_rows, byte, row;  // of tiles
  int add, a, b;                                  // of products: whether to add, and the first byte of each line
};

struct Task {
  Data data;
  How how;
  TileMap map;
};

constexpr int kMostShared = 96 << 10;

template <class Body>
__global__ void __launch_bounds__(kWarpgroup, 1) warpgroup_kernel(const __grid_constant__ Task task) {
  if constexpr (kHasWarpgroups) Body::run(task, aligned_shared_memory<unsigned char>(), static_cast<int>(threadIdx.x));
}

// Between global and shared memory, by all threads.
__device__ inline void copy_in(unsigned char* shared, const uint32_t* from, int bytes) {
  for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += kWarpgroup * 16) {
    store(reinterpret_cast<Bytes16*>(shared + i), load(reinterpret_cast<const Bytes16*>(from + i / 4)));
  }
}

__device__ inline void copy_out(uint32_t* to, const unsigned char* shared, int bytes) {
  for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += kWarpgroup * 16) {
    store(reinterpret_cast<Bytes16*>(to + i / 4), load(reinterpret_cast<const Bytes16*>(shared + i)));
  }
}

__device__ inline TileBarrier* barrier_at(unsigned char* shared, int i) {
  return reinterpret_cast<TileBarrier*>(shared + kMostShared) + i;
}

// --- tiles: a is the matrix and y the tile's bytes as they lie, or the other way round

template <Swizzle kSwizzle>
struct LoadTile {
  static constexpr Swizzle kLines = kSwizzle;
  static const void* matrix(const Data& d) { return d.a; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const int bytes = task.how.tile_rows * static_cast<int>(kSwizzle);
    TileBarrier* const barrier = barrier_at(shared, 0);
    if (thread == 0) {
      tile_barrier_init(barrier, 1);
      tile_barriers_ready();
    }
    __syncthreads();
    if (thread == 0) {
      tile_barrier_expect(barrier, static_cast<unsigned>(bytes));
      load_tile(shared, task.map, task.how.byte, task.how.row, barrier);
    }
    tile_barrier_wait(barrier, 0);
    copy_out(task.data.y, shared, bytes);
  }
};

template <Swizzle kSwizzle>
struct StoreTile {
  static constexpr Swizzle kLines = kSwizzle;
  static const void* matrix(const Data& d) { return d.y; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    copy_in(shared, task.data.a, task.how.tile_rows * static_cast<int>(kSwizzle));
    copies_see_stores();
    __syncthreads();
    if (thread != 0) return;
    store_tile(task.map, shared, task.how.byte, task.how.row);
    store_tile_commit();
    store_tile_wait<0>();
  }
};

// Two blocks fetch half of a tile each, for both, in two rounds; a warp of each block says to both when the first has
// been copied out. y: what each block got, in each round.
struct LoadToAll {
  static constexpr Swizzle kLines = Swizzle::k128;
  static const void* matrix(const Data& d) { return d.a; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const int half = task.how.tile_rows * static_cast<int>(kLines), rank = static_cast<int>(cluster_rank());
    TileBarrier *const full = barrier_at(shared, 0), *const empty = barrier_at(shared, 1);
    if (thread == 0) {
      tile_barrier_init(full, 1);
      tile_barrier_init(empty, 2);
      tile_barriers_ready();
    }
    cluster_barrier();
    for (int round = 0; round < 2; ++round) {
      if (thread == 0) {
        tile_barrier_wait(empty, static_cast<unsigned>(round) ^ 1);
        tile_barrier_expect(full, static_cast<unsigned>(2 * half));
        load_tile_to_all<2>(shared + rank * half, task.map, task.how.byte,
                            task.how.row + (2 * round + rank) * task.how.tile_rows, full);
      }
      tile_barrier_wait(full, static_cast<unsigned>(round));
      copy_out(task.data.y + (static_cast<int>(blockIdx.x) * 2 + round) * (half / 2), shared, 2 * half);
      __syncthreads();
      if (thread >= 32 && thread < 34) tile_barrier_arrive(empty, static_cast<unsigned>(thread - 32));
    }
    cluster_barrier();
  }
};

// Of four blocks the two whose ranks differ by two fetch half of a tile each, for both. y: what each block got.
struct LoadToSome {
  static constexpr Swizzle kLines = Swizzle::k128;
  static const void* matrix(const Data& d) { return d.a; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const int half = task.how.tile_rows * static_cast<int>(kLines), rank = static_cast<int>(cluster_rank());
    TileBarrier* const full = barrier_at(shared, 0);
    if (thread == 0) {
      tile_barrier_init(full, 1);
      tile_barriers_ready();
    }
    cluster_barrier();
    if (thread == 0) {
      tile_barrier_expect(full, static_cast<unsigned>(2 * half));
      load_tile_to(5u << rank % 2, shared + rank / 2 * half, task.map, task.how.byte,
                   task.how.row + rank * task.how.tile_rows, full);
    }
    tile_barrier_wait(full, 0);
    copy_out(task.data.y + static_cast<int>(blockIdx.x) * (half / 2), shared, 2 * half);
    cluster_barrier();
  }
};

// What the threads of a block have stored in the shared memory of the other one of a pair, copied to y from there.
struct StoreRemote {
  static constexpr Swizzle kLines = Swizzle::kNone;
  static const void* matrix(const Data& d) { return d.y; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const auto block = static_cast<int>(blockIdx.x);
    store_remote(reinterpret_cast<uint32_t*>(shared) + thread, cluster_rank() ^ 1,
                 load(task.data.a + block * kWarpgroup + thread));
    copies_see_remote_stores();
    cluster_barrier();
    if (thread != 0) return;
    store_tile(task.map, shared, task.how.byte, block * task.how.tile_rows);
    store_tile_commit();
    store_tile_wait<0>();
  }
};

// Each thread of a block tells the one with its number in the other of a pair four words, one after the other by way of
// the same 16 bytes, which the reader gives back. y: what each thread was told, round by round.
struct TellRemote {
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const unsigned other = cluster_rank() ^ 1;
    auto* const told = reinterpret_cast<Bytes16*>(shared) + thread;
    TileBarrier* const full = reinterpret_cast<TileBarrier*>(shared + kWarpgroup * sizeof(Bytes16)) + 2 * thread;
    TileBarrier* const empty = full + 1;
    tile_barrier_init(full, 1);
    tile_barrier_init(empty, 1);
    tile_barriers_ready();
    cluster_barrier();
    const int first = (static_cast<int>(blockIdx.x) * kWarpgroup + thread) * 8;
    for (int round = 0; round < 2; ++round) {
      Bytes16 words;
      for (int i = 0; i < 4; ++i) words.word[i] = load(task.data.a + first + round * 4 + i);
      tile_barrier_wait(empty, static_cast<unsigned>(round) ^ 1);
      store_remote(told, other, words);
      tile_barrier_arrive_remote(full, other);
      tile_barrier_wait_remote(full, static_cast<unsigned>(round));
      store(reinterpret_cast<Bytes16*>(task.data.y + first) + round, load(told));
      tile_barrier_arrive(empty, other);
    }
    cluster_barrier();
  }
};

// What a thread of one block has stored in global memory, fetched by one of another once all blocks have arrived.
// y: the words that were stored, those that were fetched, the counter.
struct LoadStored {
  static constexpr Swizzle kLines = Swizzle::kNone;
  static const void* matrix(const Data& d) { return d.y; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x), bytes = kWarpgroup * 4;
    uint32_t* const counter = task.data.y + 2 * blocks * kWarpgroup;
    TileBarrier *const arrived = barrier_at(shared, 0), *const full = barrier_at(shared, 1);
    auto* const before = reinterpret_cast<uint32_t*>(shared + kMostShared) - 1;
    if (thread == 0) {
      tile_barrier_init(arrived, 1);
      tile_barrier_init(full, 1);
      tile_barriers_ready();
    }
    store(task.data.y + block * kWarpgroup + thread, load(task.data.a + block * kWarpgroup + thread));
    copies_see_global_stores();
    __syncthreads();
    if (thread == 0) {
      store(before, grid_arrive(counter));
      tile_barrier_arrive(arrived);
    } else if (thread == 32) {
      tile_barrier_wait(arrived, 0);
      grid_wait(counter, load(before));
      copies_see_global_stores();
      tile_barrier_expect(full, static_cast<unsigned>(bytes));
      load_tile(shared, task.map, 0, (block + 1) % blocks * task.how.tile_rows, full);
    }
    tile_barrier_wait(full, 0);
    copy_out(task.data.y + (blocks + block) * kWarpgroup, shared, bytes);
  }
};

// --- barriers

// Warps 0 and 1 hand rounds of 64 words to warps 2 and 3, which store them backwards; a lane of each warp arrives for
// it. A wait for the phase before the first does not wait.
struct TileBarriers {
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    constexpr int kRounds = 8;
    TileBarrier *const full = barrier_at(shared, 0), *const empty = barrier_at(shared, 1);
    auto* words = reinterpret_cast<uint32_t*>(shared);
    if (thread == 0) {
      tile_barrier_init(full, 2);
      tile_barrier_init(empty, 64);
      tile_barriers_ready();
    }
    __syncthreads();
    for (int r = 0; r < kRounds; ++r) {
      const unsigned turn = r % 2;
      if (thread < 64) {
        tile_barrier_wait(empty, turn ^ 1);
        store(words + thread, load(task.data.a + r * 64 + thread));
        __syncwarp();
        if (thread % 32 == 0) tile_barrier_arrive(full);
      } else {
        tile_barrier_wait(full, turn);
        store(task.data.y + r * 64 + thread - 64, load(words + 127 - thread));
        tile_barrier_arrive(empty);
      }
    }
  }
};

// One phase for the tiles of two threads, each of which says how many bytes its own has, and a third that only arrives;
// then a phase without bytes. y: what two rounds of that have fetched, 96 rows each.
struct TileBytes {
  static constexpr Swizzle kLines = Swizzle::k64;
  static const void* matrix(const Data& d) { return d.a; }
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    constexpr int kTile = 32 * 64;
    TileBarrier* const barrier = barrier_at(shared, 0);
    if (thread == 0) {
      tile_barrier_init(barrier, 3);
      tile_barriers_ready();
    }
    __syncthreads();
    for (int round = 0; round < 2; ++round) {
      const int first = round * 3 * kTile, row = round * 96;
      if (thread == 0) {
        tile_barrier_expect(barrier, kTile);
        load_tile(shared + first, task.map, 0, row, barrier);
      } else if (thread == 32) {
        tile_barrier_expect(barrier, 2 * kTile);
        load_tile(shared + first + kTile, task.map, 0, row + 32, barrier);
        load_tile(shared + first + 2 * kTile, task.map, 0, row + 64, barrier);
      } else if (thread == 64) {
        tile_barrier_arrive(barrier);
      }
      tile_barrier_wait(barrier, 0);
      copy_out(task.data.y + first / 4, shared + first, 3 * kTile);
      __syncthreads();
      if (thread < 3) tile_barrier_arrive(barrier);
      tile_barrier_wait(barrier, 1);
      __syncthreads();  // none waits for a phase when the next has ended
    }
  }
};

// --- products

// a: 64 lines of 128 bytes, as they lie, then Words * 2 such lines; b: the sums that a thread begins with.
template <class A, int Words>
struct DenseProduct {
  static constexpr int kA = 64 * 128, kB = Words * 2 * 128;
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const Data& d = task.data;
    copy_in(shared, d.a, kA + kB);
    copies_see_stores();
    __syncthreads();
    float sum[Words];
    const auto* from = reinterpret_cast<const float*>(d.b) + thread * Words;
    for (int i = 0; i < Words; ++i) sum[i] = load(from + i);
    warpgroup_fence();
    warpgroup_mma<A>(sum, shared_tile<Swizzle::k128>(shared + task.how.a),
                     shared_tile<Swizzle::k128>(shared + kA + task.how.b), task.how.add != 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    auto* to = reinterpret_cast<float*>(d.y) + thread * Words;
    for (int i = 0; i < Words; ++i) store(to + i, sum[i]);
  }
};

// a: 64 lines of 64 or 128 bytes, as they lie, then from 8192 on Words * 2 lines of 128; b: the sums that a thread
// begins with; c: its metadata.
template <class A, int Selector, int Words, Swizzle kValues>
struct Product {
  static constexpr int kA = 64 * 128, kB = Words * 2 * 128;
  using Sum = std::conditional_t<std::is_same_v<A, int8_t>, int32_t, float>;
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const Data& d = task.data;
    copy_in(shared, d.a, kA + kB);
    copies_see_stores();
    __syncthreads();
    Sum sum[Words];
    const auto* from = reinterpret_cast<const Sum*>(d.b) + thread * Words;
    for (int i = 0; i < Words; ++i) sum[i] = load(from + i);
    const uint32_t kept = load(d.c + thread);
    warpgroup_fence();
    warpgroup_mma_sparse<A, Selector>(sum, shared_tile<kValues>(shared + task.how.a),
                                      shared_tile<Swizzle::k128>(shared + kA + task.how.b), kept, task.how.add != 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    auto* to = reinterpret_cast<Sum*>(d.y) + thread * Words;
    for (int i = 0; i < Words; ++i) store(to + i, sum[i]);
  }
};

// Registers given up by a warpgroup and taken by it again: its words are still there.
struct Registers {
  static __device__ void run(const Task& task, unsigned char*, int thread) {
    const uint32_t word = load(task.data.a + thread);
    warpgroup_registers<40, false>();
    warpgroup_registers<128, true>();
    store(task.data.y + thread, word);
  }
};

// --- warps

// a: the words of four tiles that a lane has; b: the line of shared memory that each lane names. y: the 32 lines, then
// what load_matrix_transposed makes of them.
struct StoreMatrix {
  static __device__ void run(const Task& task, unsigned char* shared, int thread) {
    const Data& d = task.data;
    if (thread >= 32) return;
    uint32_t tile[4], back[4];
    for (int i = 0; i < 4; ++i) tile[i] = load(d.a + thread * 4 + i);
    unsigned char* const row = shared + load(d.b + thread) * 16;
    store_matrix_transposed(row, tile);
    __syncwarp();
    store(reinterpret_cast<Bytes16*>(d.y) + thread, load(reinterpret_cast<const Bytes16*>(shared) + thread));
    load_matrix_transposed(back, row);
    for (int i = 0; i < 4; ++i) store(d.y + 128 + thread * 4 + i, back[i]);
  }
};

namespace {

using Start = void (*)(const Data&, const How&);

enum class Blocks { kOne, kClusters, kFour, kTogether };

template <class Body, Blocks kBlocks = Blocks::kOne>
void start(const Data& data, const How& how) {
  Task task{data, how, {}};
  if constexpr (requires { Body::kLines; }) {
    task.map = tile_map({Body::matrix(data), how.rows, how.width, how.stride, static_cast<unsigned>(how.tile_rows),
                         static_cast<unsigned>(Body::kLines), Body::kLines});
  }
  constexpr size_t kShared = kMostShared + 2 * sizeof(TileBarrier) + kSharedAlignment;
  const dim3 block(kWarpgroup);
  if constexpr (kBlocks == Blocks::kOne) launch(warpgroup_kernel<Body>, dim3(1), block, kShared, nullptr, task);
  if constexpr (kBlocks == Blocks::kClusters) {
    launch_cluster(warpgroup_kernel<Body>, dim3(4), block, 2, kShared, nullptr, task);
  }
  if constexpr (kBlocks == Blocks::kFour) {
    launch_cluster(warpgroup_kernel<Body>, dim3(4), block, 4, kShared, nullptr, task);
  }
  if constexpr (kBlocks == Blocks::kTogether) {
    launch_cooperative_clusters(warpgroup_kernel<Body>, dim3(4), block, 2, kShared, nullptr, task);
  }
}

const std::map<std::string, Start> kInstructions = {
    {"load_tile 16", start<LoadTile<Swizzle::kNone>>},
    {"load_tile 32", start<LoadTile<Swizzle::k32>>},
    {"load_tile 64", start<LoadTile<Swizzle::k64>>},
    {"load_tile 128", start<LoadTile<Swizzle::k128>>},
    {"store_tile 16", start<StoreTile<Swizzle::kNone>>},
    {"store_tile 32", start<StoreTile<Swizzle::k32>>},
    {"store_tile 64", start<StoreTile<Swizzle::k64>>},
    {"store_tile 128", start<StoreTile<Swizzle::k128>>},
    {"load_tile_to_all", start<LoadToAll, Blocks::kClusters>},
    {"load_tile_to", start<LoadToSome, Blocks::kFour>},
    {"store_remote", start<StoreRemote, Blocks::kClusters>},
    {"tell_remote", start<TellRemote, Blocks::kClusters>},
    {"load_stored", start<LoadStored, Blocks::kTogether>},
    {"tile_barriers", start<TileBarriers>},
    {"tile_bytes", start<TileBytes>},
    {"registers", start<Registers>},
    {"store_matrix_transposed", start<StoreMatrix>},
    {"mma bf16 32", start<DenseProduct<bf16, 16>>},
    {"mma bf16 64", start<DenseProduct<bf16, 32>>},
    {"mma bf16 128", start<DenseProduct<bf16, 64>>},
    {"mma bf16 256", start<DenseProduct<bf16, 128>>},
    {"mma fp16 32", start<DenseProduct<fp16, 16>>},
    {"mma fp16 64", start<DenseProduct<fp16, 32>>},
    {"mma fp16 128", start<DenseProduct<fp16, 64>>},
    {"mma fp16 256", start<DenseProduct<fp16, 128>>},
    {"mma_sparse bf16 0 128 64", start<Product<bf16, 0, 64, Swizzle::k64>>},
    {"mma_sparse bf16 1 128 64", start<Product<bf16, 1, 64, Swizzle::k64>>},
    {"mma_sparse bf16 0 176 64", start<Product<bf16, 0, 88, Swizzle::k64>>},
    {"mma_sparse bf16 1 176 128", start<Product<bf16, 1, 88, Swizzle::k128>>},
    {"mma_sparse fp16 0 128 64", start<Product<fp16, 0, 64, Swizzle::k64>>},
    {"mma_sparse fp16 1 128 128", start<Product<fp16, 1, 64, Swizzle::k128>>},
    {"mma_sparse fp16 0 176 64", start<Product<fp16, 0, 88, Swizzle::k64>>},
    {"mma_sparse fp16 1 176 64", start<Product<fp16, 1, 88, Swizzle::k64>>},
    {"mma_sparse int8 0 128 64", start<Product<int8_t, 0, 64, Swizzle::k64>>},
    {"mma_sparse int8 0 128 128", start<Product<int8_t, 0, 64, Swizzle::k128>>},
    {"mma_sparse int8 0 176 64", start<Product<int8_t, 0, 88, Swizzle::k64>>},
};

}  // namespace
}  // namespace burnish

// Runs an instruction in a warpgroup, on memory that the device reaches; a message where it failed, else null.
EXPORT const char* run_warpgroup(const char* name, const int* how, uint64_t seed, const void* a, const void* b,
                                 const void* c, void* y) {
  using namespace burnish;
  How given;
  std::memcpy(&given, how, sizeof given);
  return attempt(kInstructions, name, seed, [&](Start start) { start(data_of(a, b, c, y), given); });
}
