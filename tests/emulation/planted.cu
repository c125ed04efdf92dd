// Small kernels, each right as it is and wrong in one way on request: what the emulation must find, and what it must
// not complain of. One block of two warps each, but for what is said.
#include <cstdio>
#include <exception>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {
namespace {

constexpr int kThreads = 64;
constexpr int kRounds = 4;

enum class Bug : int {
  kNone,
  kNoBarrierBeforeRead,
  kNoBarrierAfterRead,
  kNoCopyWait,
  kUninitialisedShared,
  kSharedOverrun,
  kUnaligned,
  kDivergentBarrier,
  kEarlyReturn,
  kMissingLane,
  kLostUpdate,
  kWrongFragmentLane,
};

// y[r][i] = x[r][63 - i], a row at a time through one row of shared memory.
__global__ void reverse_kernel(const int32_t* x, int32_t* y, Bug bug) {
  int32_t* row = shared_memory<int32_t>();
  const int i = static_cast<int>(threadIdx.x);
  for (int r = 0; r < kRounds; ++r) {
    if (bug != Bug::kUninitialisedShared || i != 5) row[i + (bug == Bug::kSharedOverrun ? 1 : 0)] = x[r * kThreads + i];
    if (bug != Bug::kNoBarrierBeforeRead) __syncthreads();
    if (bug == Bug::kEarlyReturn && i == 7) return;
    y[r * kThreads + i] = row[kThreads - 1 - i];
    if (bug == Bug::kDivergentBarrier && i >= 32) continue;
    if (bug != Bug::kNoBarrierAfterRead) __syncthreads();
  }
}

// y = x, 16 bytes a thread and round, by way of two stages of asynchronous copies.
__global__ void copy_kernel(const Bytes16* x, Bytes16* y, Bug bug) {
  Bytes16* stages = shared_memory<Bytes16>();
  const int i = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int r) {
    if (r < kRounds) copy_async16(stages + r % 2 * kThreads + i, x + r * kThreads + i, true);
    copy_async_commit();
  };
  fetch(0);
  for (int r = 0; r < kRounds; ++r) {
    fetch(r + 1);
    if (bug != Bug::kNoCopyWait) copy_async_wait<1>();
    y[r * kThreads + i] = stages[r % 2 * kThreads + i];
  }
}

// Every thread reads 16 bytes; the largest of its warp goes to each.
__global__ void largest_kernel(const uint32_t* x, uint32_t* y, Bug bug) {
  const int i = static_cast<int>(threadIdx.x);
  const Bytes16 mine = load_streaming(x + i * 4 + (bug == Bug::kUnaligned ? 1 : 0));
  uint32_t largest = 0;
  for (const uint32_t word : mine.word) largest = word > largest ? word : largest;
  if (bug != Bug::kMissingLane || i != 40) largest = warp_max(largest);
  y[i] = largest;
}

// Counts the threads of eight blocks.
__global__ void count_kernel(uint32_t* counter, Bug bug) {
  if (bug == Bug::kLostUpdate) {
    const auto seen = load_coherent(reinterpret_cast<const int32_t*>(counter));
    *counter = static_cast<uint32_t>(seen) + 1;
  } else {
    draw_ticket(counter);
  }
}

// y[16][8] = a[16][32] * b[8][32]^T of a warp.
__global__ void product_kernel(const int8_t* a, const int8_t* b, int32_t* y, Bug bug) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, t = lane % 4;
  const auto word = [](const int8_t* at) { return *reinterpret_cast<const uint32_t*>(at); };
  const int high = bug == Bug::kWrongFragmentLane ? 4 : 8;
  int32_t sum[4] = {};
  mma_int8(sum, word(a + group * 32 + t * 4), word(a + (group + high) * 32 + t * 4), word(a + group * 32 + t * 4 + 16),
           word(a + (group + high) * 32 + t * 4 + 16), word(b + group * 32 + t * 4), word(b + group * 32 + t * 4 + 16));
  for (int i = 0; i < 4; ++i) y[(group + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}

}  // namespace
}  // namespace burnish

// Runs kernel `name` with a seed; a message where the emulation stopped it, else null.
extern "C" __attribute__((visibility("default"))) const char* run_planted(int name, int which, uint64_t seed,
                                                                          const void* a, const void* b, void* y) {
  using namespace burnish;
  static char message[2048];
  const Bug bug = static_cast<Bug>(which);
  host::set_seed(seed);
  try {
    switch (name) {
      case 0:
        launch(reverse_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(int32_t), nullptr,
               static_cast<const int32_t*>(a), static_cast<int32_t*>(y), bug);
        break;
      case 1:
        launch(copy_kernel, dim3(1), dim3(kThreads), 2 * kThreads * sizeof(Bytes16), nullptr,
               static_cast<const Bytes16*>(a), static_cast<Bytes16*>(y), bug);
        break;
      case 2:
        launch(largest_kernel, dim3(1), dim3(kThreads), 0, nullptr, static_cast<const uint32_t*>(a),
               static_cast<uint32_t*>(y), bug);
        break;
      case 3:
        launch(count_kernel, dim3(8), dim3(kThreads), 0, nullptr, static_cast<uint32_t*>(y), bug);
        break;
      default:
        launch(product_kernel, dim3(1), dim3(32), 0, nullptr, static_cast<const int8_t*>(a),
               static_cast<const int8_t*>(b), static_cast<int32_t*>(y), bug);
    }
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  return nullptr;
}
