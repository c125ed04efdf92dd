// How the kernels share tiles that stream a weight past a few rows of x: what warps and blocks take, and the sums of
// the warps brought together.
//
// A block is kWarps warps that share the depth of a tile of 16 kChannelTiles channels; 8 rows of x are a row tile. A
// tile with long rows is split over several blocks where the device would otherwise have idle ones. The block that
// finishes last adds the partial sums, always in the same order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cuda/counters.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// What a warp fetches next. Blocks take every gridDim.x-th tile, and of its rows the stages of one split, blockIdx.y;
// step s of a warp is stage (s * splits + split) * kWarps + warp.
template <int kStageBytes>
struct TileCursor {
  int tile;
  int k;  // the stage's first byte in a row

  __device__ static int first_k() { return static_cast<int>(blockIdx.y * kWarps + threadIdx.x / 32) * kStageBytes; }
  // How many stages each warp takes of rows of `width` bytes; of zeros at last.
  __device__ static int steps(int width, int splits) {
    const int turn = splits * (kWarps * kStageBytes);
    return (width + turn - 1) / turn;
  }
  __device__ void advance(int end, int splits) {
    k += splits * (kWarps * kStageBytes);
    if (k >= end) {
      k = first_k();
      tile += static_cast<int>(gridDim.x);
    }
  }
};

// Where the splits of tiles meet.
template <class Sum>
struct Splits {
  Sum* partial;       // [tiles, count, outputs of a tile]; not used by one split
  uint32_t* tickets;  // [tiles], zero between launches
  int count;
};

// How blocks share `tiles`, and what splitting them needs.
struct TilePlan {
  dim3 grid;
  int splits;
  torch::stable::Tensor partial;
  Counters counters;

  template <class Sum>
  Splits<Sum> meet() const {
    if (splits == 1) return {nullptr, nullptr, 1};
    return {static_cast<Sum*>(partial.mutable_data_ptr()), counters.tickets(), splits};
  }
};

// For blocks of `shared` bytes and tiles of `tile_bytes` to read and `tile_outputs` 32-bit sums.
inline TilePlan plan_tiles(const torch::stable::Tensor& like, const DeviceLimits& limits, size_t shared, int64_t tiles,
                           int64_t tile_bytes, int64_t tile_outputs) {
  using torch::headeronly::ScalarType;
  // Below this many bytes a block, splitting a tile costs more than it saves: the exchange is three trips to L2, about
  // 1.5 us, in which one multiprocessor fetches 64 bytes a cycle.
  constexpr int64_t kSplitBytes = 128 << 10;
  constexpr int kReserved = 1024;  // what the system takes of a multiprocessor's shared memory for each block
  const int64_t places =
      int64_t{limits.multiprocessors} * std::max(1, limits.shared_memory / (static_cast<int>(shared) + kReserved));
  const int64_t most = tiles <= Counters::kTickets ? places / tiles : 1;
  const int64_t splits = std::max<int64_t>(1, std::min(most, tile_bytes / kSplitBytes));
  TilePlan plan{{static_cast<unsigned>(std::min(tiles, places / splits)), static_cast<unsigned>(splits)},
                static_cast<int>(splits),
                {},
                {}};
  if (splits > 1) {
    plan.partial = torch::stable::new_empty(like, {tiles * splits * tile_outputs}, ScalarType::Int);
    plan.counters = counters_of(like);
  }
  return plan;
}

// The sums of a tile, brought together from the warps: thread i holds channel i % kChannels, and every kRowStep-th row
// from first_row() on.
template <class Sum, int kRowTiles, int kChannelTiles>
struct Gather {
  static constexpr int kChannels = 16 * kChannelTiles;
  static constexpr int kRowStep = kThreads / kChannels;
  static constexpr int kOutputs = 8 * kRowTiles / kRowStep;  // a thread
  static constexpr int kPitch = kChannels + 4;               // the lanes of a warp then write to 32 different banks
  static constexpr int kWords = kWarps * 8 * kRowTiles * kPitch;

  // The two rows that a warp reads of 16 channels are 4 apart, so that they lie in different banks.
  static __device__ int first_row() {
    const int warp = static_cast<int>(threadIdx.x / 32);
    return kChannels == 16 ? warp + static_cast<int>(threadIdx.x % 32 / 16) * 4 : warp;
  }

  // Takes kRowTiles of the row tiles in `sum`, from `first` on.
  template <int kAll>
  static __device__ void gather(Sum* words, const Sum (&sum)[kChannelTiles][kAll][4], int first,
                                Sum (&total)[kOutputs]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    Sum* mine = words + threadIdx.x / 32 * (8 * kRowTiles * kPitch);
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int channel = j * 16 + r / 2 * 8 + lane / 4;
          const int row = i * 8 + lane % 4 * 2 + r % 2;
          store(mine + (row * kPitch + channel), sum[j][first + i][r]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int at = (first_row() + o * kRowStep) * kPitch + static_cast<int>(threadIdx.x) % kChannels;
      total[o] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total[o] += load(words + (w * 8 * kRowTiles * kPitch + at));
    }
    __syncthreads();
  }

  // Adds the splits of a tile; true in the block that has the result, the one that came last.
  static __device__ bool add_splits(const Splits<Sum>& splits, int tile, uint32_t* ticket, Sum (&total)[kOutputs]) {
    Sum* sums = splits.partial + static_cast<int64_t>(tile) * splits.count * kOutputs * kThreads + threadIdx.x;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) store(sums + (static_cast<int>(blockIdx.y) * kOutputs + o) * kThreads, total[o]);
    __syncthreads();
    if (threadIdx.x == 0) store(ticket, draw_ticket(splits.tickets + tile));
    __syncthreads();
    if (load(ticket) != static_cast<uint32_t>(splits.count - 1)) return false;
    if (threadIdx.x == 0) store(splits.tickets + tile, 0u);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      total[o] = 0;
      for (int s = 0; s < splits.count; ++s) total[o] += load_coherent(sums + (s * kOutputs + o) * kThreads);
    }
    return true;
  }
};

}  // namespace burnish
