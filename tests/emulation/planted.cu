// Small kernels, each right as it is and wrong in one way on request: what the emulation must find, and what it must
// not complain of.
#include "planted.cuh"

namespace burnish {
namespace {

enum class Bug : int {
  kNone,
  kNoBarrierBeforeRead,
  kNoBarrierAfterRead,
  kNoCopyWait,
  kNoWarpSync,
  kUninitialisedShared,
  kSharedOverrun,
  kGlobalOverrun,
  kUnaligned,
  kRawOverrun,
  kRawUnaligned,
  kDivergentBarrier,
  kSkippedBarrier,
  kUnequalBarriers,
  kEarlyReturn,
  kMissingLane,
  kMaskWithoutSource,
  kLostUpdate,
  kNoTicket,
  kNoBarrierBeforeTicket,
  kWrongFragmentLane,
  kSplitProduct,
  kMatrixFromGlobal,
  kNoDependencyWait,
  kEndlessWait,
  kEndlessLoad,
  kNotModelled,
  kStreamFromShared,
  kCopyFromShared,
  kRemoteGlobal,
  kGridBarrierAlone,
};

constexpr int kThreads = 64;
constexpr int kRounds = 4;

// y[r][i] = x[r][63 - i], a row at a time through one row of shared memory.
__global__ void reverse_kernel(const int32_t* x, int32_t* y, Bug bug) {
  int32_t* row = shared_memory<int32_t>();
  const int i = static_cast<int>(threadIdx.x);
  for (int r = 0; r < kRounds; ++r) {
    if (bug != Bug::kUninitialisedShared || i != 5) {
      store(row + i + (bug == Bug::kSharedOverrun ? 1 : 0),
            load(x + r * kThreads + i + (bug == Bug::kGlobalOverrun && r == kRounds - 1 ? 1 : 0)));
    }
    if (bug != Bug::kNoBarrierBeforeRead) __syncthreads();
    if (bug == Bug::kEarlyReturn && i == 7) return;
    store(y + r * kThreads + i, load(row + kThreads - 1 - i));
    if (bug == Bug::kSkippedBarrier && i >= 32) continue;
    if (bug == Bug::kDivergentBarrier && i >= 32) {
      __syncthreads();
    } else if (bug == Bug::kUnequalBarriers) {
      barrier_sync(1, i < 32 ? 64 : 32);
    } else if (bug != Bug::kNoBarrierAfterRead) {
      __syncthreads();
    }
  }
  if (bug == Bug::kRawOverrun && i == 63) row[i + 1] = 0;
  if (bug == Bug::kRawUnaligned) *reinterpret_cast<Bytes16*>(y + 1) = Bytes16{};
}

// y = x, 16 bytes a thread and round, by way of two stages of asynchronous copies, the last of zeros, from an address
// that is not read and may lie anywhere. A block ends without a wait for that one.
__global__ void copy_kernel(const Bytes16* x, Bytes16* y, Bug bug) {
  Bytes16* stages = shared_memory<Bytes16>();
  const int i = static_cast<int>(threadIdx.x), rounds = kRounds / static_cast<int>(gridDim.x);
  x += static_cast<int>(blockIdx.x) * rounds * kThreads;
  y += static_cast<int>(blockIdx.x) * rounds * kThreads;
  const auto fetch = [&](int r) {
    const bool inside = r < rounds;
    copy_async16(stages + r % 2 * kThreads + i, inside ? x + r * kThreads + i : stages + i, inside);
    copy_async_commit();
  };
  fetch(0);
  for (int r = 0; r < rounds; ++r) {
    fetch(r + 1);
    if (bug != Bug::kNoCopyWait) copy_async_wait<1>();
    store(y + r * kThreads + i, load(stages + r % 2 * kThreads + i));
  }
}

// What no instruction does.
__device__ void misuse(uint32_t* shared, uint32_t* global, Bug bug) {
  if (bug == Bug::kNotModelled) __shfl_xor_sync(kFullWarp, 0, 1);
  if (bug == Bug::kStreamFromShared) load_streaming(shared);
  if (bug == Bug::kCopyFromShared) copy_async<4>(shared, shared + 1, true);
  if (bug == Bug::kRemoteGlobal) load_remote(global, 0);
  if (bug == Bug::kGridBarrierAlone) grid_barrier(global);
}

// Every thread reads 16 bytes; the largest word of its warp goes to each, by shuffles, by one instruction, and by
// shared memory.
__global__ void largest_kernel(const uint32_t* x, uint32_t* y, Bug bug) {
  uint32_t* words = shared_memory<uint32_t>();
  const int i = static_cast<int>(threadIdx.x);
  misuse(words, y, bug);
  const Bytes16 mine = load_streaming(x + i * 4 + (bug == Bug::kUnaligned ? 1 : 0));
  uint32_t largest = 0;
  for (const uint32_t word : mine.word) largest = word > largest ? word : largest;
  store(words + i, largest);
  if (bug != Bug::kNoWarpSync) __syncwarp();
  for (int bits = 1; bits < 32; bits *= 2) {
    if (bug == Bug::kMissingLane && i == 40) continue;
    const uint32_t mask = bug == Bug::kMaskWithoutSource ? (i % 32 < 16 ? 0xffffu : 0xffff0000u) : kFullWarp;
    const uint32_t other = shuffle_xor(mask, largest, bits);
    largest = other > largest ? other : largest;
  }
  uint32_t shared = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t other = load(words + i / 32 * 32 + lane);
    shared = other > shared ? other : shared;
  }
  store(y + i, largest == shared && largest == reduce_max(kFullWarp, shared) ? largest : 0u);
}

// Counts the threads of eight blocks.
__global__ void count_kernel(uint32_t* counter, Bug bug) {
  if (bug == Bug::kLostUpdate) {
    store(counter, load(counter) + 1);
  } else {
    atomic_add(counter, 1u);
  }
  if (bug == Bug::kEndlessWait) {
    while (atomic_max(counter, 0u) < 10000) {
    }
  }
  if (bug == Bug::kEndlessLoad && threadIdx.x == 0) {
    uint32_t* flag = shared_memory<uint32_t>();
    store(flag, 0u);
    while (load(flag) == 0) {
    }
  }
}

// y[0] = the sum of x over eight blocks, added by the block that comes last. scratch: eight sums, then the ticket.
__global__ void sum_kernel(const int32_t* x, int32_t* y, int32_t* scratch, Bug bug) {
  int32_t* last = shared_memory<int32_t>();
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int32_t sum = reduce_add(kFullWarp, load(x + i));
  if (threadIdx.x % 32 == 0) atomic_add(scratch + blockIdx.x, sum);
  if (bug != Bug::kNoBarrierBeforeTicket) __syncthreads();
  if (threadIdx.x == 0) {
    auto* ticket = reinterpret_cast<uint32_t*>(scratch + 8);
    store(last, static_cast<int32_t>(bug == Bug::kNoTicket ? atomic_add(ticket, 1u) : draw_ticket(ticket)));
  }
  __syncthreads();
  if (load(last) != 7 || threadIdx.x != 0) return;
  int32_t total = 0;
  for (int b = 0; b < 8; ++b) total += load_coherent(scratch + b);
  store(y, total);
}

// scratch = x, then y = scratch + 1, in two launches that may overlap.
__global__ void first_kernel(const int32_t* x, int32_t* scratch) {
  dependents_start();
  store(scratch + threadIdx.x, load(x + threadIdx.x));
}

__global__ void second_kernel(const int32_t* scratch, int32_t* y, Bug bug) {
  if (bug != Bug::kNoDependencyWait) dependency_wait();
  store(y + threadIdx.x, load_coherent(scratch + threadIdx.x) + 1);
}

constexpr int kTile = 128;
constexpr int kWidth = 32;           // of a stage along k
constexpr int kChunks = kWidth / 8;  // of 16 bytes in a row of it
constexpr int kGemmThreads = 256;    // two by four warps of 64 x 32 outputs

// y[m][n] = a[m][k] * b[n][k]^T, in tiles of 128 x 128 with two stages; every size a multiple of its tile's.
__global__ void gemm_kernel(const bf16* a, const bf16* b, float* y, int n, int k, Bug bug) {
  Bytes16* stages = shared_memory<Bytes16>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = static_cast<int>(blockIdx.y) * kTile, column = static_cast<int>(blockIdx.x) * kTile;
  // neighbouring rows keep their chunks in different banks
  const auto slot = [&](int stage, int operand, int r, int chunk) {
    return stages + ((stage * 2 + operand) * kTile + r) * kChunks + (chunk ^ (r / 2 % kChunks));
  };
  const auto fetch = [&](int step) {
    for (int i = thread; i < 2 * kTile * kChunks && step * kWidth < k; i += kGemmThreads) {
      const int operand = i / (kTile * kChunks), r = i / kChunks % kTile, chunk = i % kChunks;
      const bf16* from = operand == 0 ? a + (row + r) * k : b + (column + r) * k;
      copy_async16(slot(step % 2, operand, r, chunk), from + step * kWidth + chunk * 8, true);
    }
    copy_async_commit();
  };
  float sum[4][4][4] = {};
  fetch(0);
  for (int step = 0; step * kWidth < k; ++step) {
    fetch(step + 1);
    if (bug != Bug::kNoCopyWait) copy_async_wait<1>();
    if (bug != Bug::kNoBarrierBeforeRead) __syncthreads();
    for (int part = 0; part < kWidth / 16; ++part) {
      uint32_t left[4][4], right[2][4];
      for (int i = 0; i < 4; ++i) {
        const int half = bug == Bug::kWrongFragmentLane ? lane % 2 : lane / 16;
        const Bytes16* from = slot(step % 2, 0, warp / 4 * 64 + i * 16 + lane % 16, part * 2 + half);
        load_matrix(left[i], bug == Bug::kMatrixFromGlobal ? static_cast<const void*>(a) : from);
      }
      for (int j = 0; j < 2; ++j) {
        const int r = warp % 4 * 32 + j * 16 + lane / 16 * 8 + lane % 8;
        load_matrix(right[j], slot(step % 2, 1, r, part * 2 + lane / 8 % 2));
      }
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          const uint32_t columns[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          if (bug == Bug::kSplitProduct && lane < 16) {
            mma<bf16>(sum[i][j], left[i], columns);
          } else {
            mma<bf16>(sum[i][j], left[i], columns);
          }
        }
      }
    }
    if (bug != Bug::kNoBarrierAfterRead) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int r = row + warp / 4 * 64 + i * 16 + e / 2 * 8 + lane / 4;
        const int c = column + warp % 4 * 32 + j * 8 + lane % 4 * 2 + e % 2;
        store(y + r * n + c, sum[i][j][e]);
      }
    }
  }
}

void run(const char* name, const Call& c) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("reverse")) {
    launch(reverse_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(int32_t), nullptr, c.in<int32_t>(c.a),
           c.out<int32_t>(c.y), c.bug);
  } else if (is("copy")) {
    launch(copy_kernel, dim3(2), dim3(kThreads), 2 * kThreads * sizeof(Bytes16), nullptr, c.in<Bytes16>(c.a),
           c.out<Bytes16>(c.y), c.bug);
  } else if (is("largest")) {
    launch(largest_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(uint32_t), nullptr, c.in<uint32_t>(c.a),
           c.out<uint32_t>(c.y), c.bug);
  } else if (is("count")) {
    launch(count_kernel, dim3(8), dim3(kThreads), sizeof(uint32_t), nullptr, c.out<uint32_t>(c.y), c.bug);
  } else if (is("sum")) {
    launch(sum_kernel, dim3(8), dim3(kThreads), sizeof(int32_t), nullptr, c.in<int32_t>(c.a), c.out<int32_t>(c.y),
           c.out<int32_t>(c.scratch), c.bug);
  } else if (is("overlap")) {
    launch(first_kernel, dim3(1), dim3(kThreads), 0, nullptr, c.in<int32_t>(c.a), c.out<int32_t>(c.scratch));
    launch_dependent(second_kernel, dim3(1), dim3(kThreads), 0, nullptr, c.out<int32_t>(c.scratch), c.out<int32_t>(c.y),
                     c.bug);
  } else {  // "gemm", or one tile of it
    const int tiles = is("gemm") ? 2 : 1, k = is("gemm") ? 512 : 128;
    launch(gemm_kernel, dim3(tiles, tiles), dim3(kGemmThreads), 4 * kTile * kWidth * sizeof(bf16), nullptr,
           c.in<bf16>(c.a), c.in<bf16>(c.b), c.out<float>(c.y), tiles * kTile, k, c.bug);
  }
}

}  // namespace
}  // namespace burnish
