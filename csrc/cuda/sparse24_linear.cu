// sparse24_linear in CUDA C++, on the sparse tensor cores: bf16 and fp16 weights, and int8 ones with x quantised by a
// launch of its own, as int8_linear.cu does. fp32 has no such instruction.
//
//   sparse24_linear_fwd_kernel_few    at most 16 rows of x: streams the weight once, as fast as memory gives it
//   sparse24_linear_fwd_kernel_tiles  more rows: tiles of 256 channels by 64 or 128 rows
//   sparse24_linear_fwd_kernel_wide   many rows on sm_90a: sparse24_wide.cuh
//   sparse24_linear                   checks a call and chooses
//
// Few rows. A block is four warps that share the depth of a tile of 16 or 32 channels; each takes every fourth stage of
// 128 bytes of values a row, with their metadata and 256 bytes of each row of x, by cp.async into a ring of its own.
// The ring is that of int8_linear.cu but for one thing: lanes read by ldmatrix what other lanes of the warp copied.
//
// Tiles. Eight warps take 64 channels by half of the rows each. Per step a warp loads 64 x 32 + 64 x 64 bytes for 32
// instructions: 192 cycles of shared memory for the four warps that work at a time, where an A100 multiplies for 256
// and an H100 for about as many as it loads. 256 channels rather than 128 because all of x and of the weight come from
// L2: a stage brings 34 KB for 2 M products, 33 bytes a cycle at an A100's full rate. The depth is cut into stages of
// two steps; metadata comes by 16 bytes a row, which are two stages of 16-bit values and one of int8.
//
// Where a device has clusters and the tiles are too few for its multiprocessors, the blocks of a cluster share a tile's
// depth and read each other's sums from shared memory, in the order of the blocks: nothing but y goes to memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "cuda/int8_quantize_rows.cuh"
#include "cuda/sparse24_wide.cuh"
#include "math/pack.h"

namespace burnish {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxWidth = 131072;      // int32 sums cannot overflow up to here, and 32 bits count a row's bytes
constexpr int64_t kMaxRows = 1 << 30;      // an int32 counts rows and channels past the last tile
constexpr int64_t kMaxChannels = 1 << 30;  // likewise
constexpr int64_t kFewRows = 16;
constexpr int64_t kWideRows = 64;   // from more on, where the device has warpgroups
constexpr int kMostWideRows = 176;  // of a tile there: sparse24_wide.cuh says why

// A stage of a warp's ring, in units of 16 bytes: values [channels][8], x [rows][16], metadata [channels][1 or 2].
template <class T_, int kRowTiles_, int kChannelTiles_, int kStages_>
struct Few {
  using T = T_;
  static constexpr int kRowTiles = kRowTiles_, kChannelTiles = kChannelTiles_, kStages = kStages_;
  static constexpr int kChannels = 16 * kChannelTiles, kRows = 8 * kRowTiles;
  static constexpr int kStageBytes = 128;  // of values in a row: a full cache line
  static constexpr int kMetadataUnits = kMetadataBytes<T> / 16;
  static constexpr int kX = kChannels * 8, kMetadata = kX + kRows * 16;
  static constexpr int kUnits = kMetadata + kChannels * kMetadataUnits;
  using Sums = Gather<Sum24<T>, kRowTiles, kChannelTiles>;
  using Cursor = TileCursor<kStageBytes>;
  static constexpr size_t kShared = kWarps * kStages * kUnits * sizeof(Bytes16) + (Sums::kWords + 1) * sizeof(uint32_t);
  static_assert(kShared <= (99 << 10), "more shared memory than a block of the smaller GPUs gets");
};

template <class S>
struct FewRing {
  const Sparse24Problem& p;
  Bytes16* units;  // the warp's
  int tiles;
  int lane;
  uint64_t policy;

  __device__ Bytes16* stage_of(int stage) const { return units + stage * S::kUnits; }

  __device__ void fetch_weight(const typename S::Cursor& at, int stage) const {
    if (at.tile >= tiles) return;
    const int channel = at.tile * S::kChannels;
    Bytes16* slots = stage_of(stage);
#pragma unroll
    for (int i = 0; i < S::kChannels / 4; ++i) {
      const int row = i * 4 + lane / 8, unit = lane % 8;
      fetch_values<typename S::T>(slots + place<8>(row, unit), p, channel + row, at.k + unit * 16, policy);
    }
    constexpr int kAll = S::kChannels * S::kMetadataUnits;
#pragma unroll
    for (int round = 0; round < kAll; round += 32) {
      const int i = round + lane;
      if (i >= kAll) break;
      const int row = i / S::kMetadataUnits, unit = i % S::kMetadataUnits;
      fetch_metadata(slots + S::kMetadata + i, p.metadata, channel + row,
                     at.k / S::kStageBytes * kMetadataBytes<typename S::T> + unit * 16, policy);
    }
  }

  // The lane's i-th unit of x.
  __device__ static int row_of(int i) { return i * 2 + static_cast<int>(threadIdx.x % 32 / 16); }
  __device__ int byte_of(const typename S::Cursor& at) const { return 2 * at.k + lane % 16 * 16; }
  __device__ Bytes16* slot_of(int stage, int i) const {
    return stage_of(stage) + S::kX + place<16>(row_of(i), lane % 16);
  }

  __device__ void fetch_x(const typename S::Cursor& at, int stage) const {
    if (at.tile >= tiles) return;
#pragma unroll
    for (int i = 0; i < S::kRows / 2; ++i) {
      const int row = row_of(i), byte = byte_of(at);
      if (p.x.aligned) {
        copy_async16(slot_of(stage, i), p.x.data + row * p.x.stride + byte, row < p.x.rows && byte < p.x.width);
      } else {
        store(slot_of(stage, i), by_elements<uint16_t>(p.x, row, byte, p.x.width));
      }
    }
  }

  // The first stages' x, by way of registers: a copy_async would complete after the weights of all stages.
  __device__ void fetch_first_x(typename S::Cursor at, int end, int splits) const {
    Bytes16 first[S::kStages][S::kRows / 2];
#pragma unroll
    for (int stage = 0; stage < S::kStages; ++stage) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) {
        const int row = row_of(i), byte = byte_of(at);
        if (!p.x.aligned) {
          first[stage][i] = at.tile < tiles ? by_elements<uint16_t>(p.x, row, byte, p.x.width) : Bytes16{};
        } else {
          const bool inside = at.tile < tiles && row < p.x.rows && byte < p.x.width;
          const unsigned char* source = p.x.data + row * p.x.stride + byte;
          first[stage][i] = inside ? load_coherent(reinterpret_cast<const Bytes16*>(source)) : Bytes16{};
        }
      }
      at.advance(end, splits);
    }
#pragma unroll
    for (int stage = 0; stage < S::kStages; ++stage) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) store(slot_of(stage, i), first[stage][i]);
    }
  }
};

// At least two blocks a multiprocessor: one's epilogue and barriers leave the other's fetches running.
template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    sparse24_linear_fwd_kernel_few(Sparse24Problem p, Splits<Sum24<typename S::T>> splits) {
  using T = typename S::T;
  using Sums = typename S::Sums;
  using Cursor = typename S::Cursor;
  Bytes16* shared = shared_memory<Bytes16>();
  Sum24<T>* words = reinterpret_cast<Sum24<T>*>(shared + kWarps * S::kStages * S::kUnits);
  uint32_t* ticket = reinterpret_cast<uint32_t*>(words + Sums::kWords);

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int channels = p.values.rows, tiles = (channels - 1) / S::kChannels + 1;
  const int steps = Cursor::steps(p.values.width, splits.count);
  const int end = steps * splits.count * (kWarps * S::kStageBytes);  // of the values
  const FewRing<S> ring{p, shared + warp * S::kStages * S::kUnits, tiles, lane, evict_first_policy()};

  Cursor next{static_cast<int>(blockIdx.x), Cursor::first_k()}, ahead = next;
  if (steps > 0) {
#pragma unroll
    for (int stage = 0; stage < S::kStages; ++stage) {
      ring.fetch_weight(ahead, stage);
      copy_async_commit();
      ahead.advance(end, splits.count);
    }
  }
  dependency_wait();
  if (steps > 0) ring.fetch_first_x(next, end, splits.count);

  int stage = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    Sum24<T> sum[S::kChannelTiles][S::kRowTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<S::kStages - 1>();
      __syncwarp();
      if (next.k < p.values.width) {
        const Bytes16* slots = ring.stage_of(stage);
        const Stage24<T, 8> at{slots, slots + S::kX, reinterpret_cast<const uint32_t*>(slots + S::kMetadata),
                               S::kMetadataUnits * 4};
        uint32_t seen = 0;
        at.template multiply<Places::kKept, !kQuantised24<T>>(sum, seen);
        if constexpr (!kQuantised24<T>) {
          if (vote_any(kFullWarp, (seen & kWithoutEnd) != 0)) at.template multiply<Places::kOthers, false>(sum, seen);
        }
      }
      __syncwarp();
      ring.fetch_weight(ahead, stage);
      ring.fetch_x(ahead, stage);
      copy_async_commit();
      ahead.advance(end, splits.count);
      next.advance(end, splits.count);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }

    Sum24<T> total[Sums::kOutputs];
    Sums::gather(words, sum, 0, total);
    if (splits.count > 1 && !Sums::add_splits(splits, tile, ticket, total)) continue;
    const int channel = tile * S::kChannels + static_cast<int>(threadIdx.x) % S::kChannels;
    if (channel >= channels) continue;
    const float bias = p.bias != nullptr ? load_as_float(p.bias, channel, p.bias_format) : 0.0f;
    const float scale = kQuantised24<T> ? load(p.scale + channel) : 1.0f;
#pragma unroll
    for (int o = 0; o < Sums::kOutputs; ++o) {
      const int row = Sums::first_row() + o * Sums::kRowStep;
      if (row >= p.x.rows) continue;
      const float row_scale = kQuantised24<T> ? load_coherent(p.row_scale + row) : 1.0f;
      store_from_float(p.y, static_cast<int64_t>(row) * channels + channel, p.y_format,
                       finished<T>(p, total[o], row_scale, scale, bias));
    }
  }
}

// Rows are 64 bytes of values and 128 of x in a stage. Metadata has a ring of its own, of 16 bytes a row.
template <class T_, int kRows_, int kStages_>
struct Tiles {
  using T = T_;
  static constexpr int kRows = kRows_, kStages = kStages_;
  static constexpr int kChannels = 256, kBlock = 256;
  static constexpr int kStageBytes = 64;
  static constexpr int kWarpChannels = 64, kWarpRows = kRows / 2;
  static constexpr int kX = kChannels * 4, kUnits = kX + kRows * 8;
  static constexpr int kTurn = 256 / (kStageBytes * kMetadataBytes<T> / 8);  // stages that a unit of metadata serves
  static constexpr int kMetadataSlots = (kStages + kTurn - 2) / kTurn + 1;
  static constexpr int kMetadata = kStages * kUnits;
  static constexpr int kPitch = kChannels + 4;  // of sums: the lanes of a warp then write to 32 different banks
  static constexpr int kEnd = kMetadata + kMetadataSlots * kChannels;
  static constexpr size_t kShared = kEnd * sizeof(Bytes16) + sizeof(uint32_t);
  static_assert(kRows * kPitch <= kEnd * 4, "the sums do not fit in the ring's place");
};

template <class S>
struct TileRing {
  const Sparse24Problem& p;
  Bytes16* units;
  int channel, row;  // the tile's first

  __device__ Bytes16* metadata_of(int stage) const {
    return units + S::kMetadata + stage / S::kTurn % S::kMetadataSlots * S::kChannels;
  }

  __device__ void fetch(int stage, int slot) const {
    const int thread = static_cast<int>(threadIdx.x);
    Bytes16* slots = units + slot * S::kUnits;
#pragma unroll
    for (int i = 0; i < S::kChannels * 4 / S::kBlock; ++i) {
      const int at = i * (S::kBlock / 4) + thread / 4, unit = thread % 4;
      fetch_values<typename S::T>(slots + place<4>(at, unit), p, channel + at, stage * S::kStageBytes + unit * 16);
    }
#pragma unroll
    for (int i = 0; i < S::kRows * 8 / S::kBlock; ++i) {
      const int at = i * (S::kBlock / 8) + thread / 8, unit = thread % 8;
      fetch_unit<uint16_t>(slots + S::kX + place<8>(at, unit), p.x, row + at, stage * (2 * S::kStageBytes) + unit * 16);
    }
    if (stage % S::kTurn == 0) {
      fetch_metadata(metadata_of(stage) + thread, p.metadata, channel + thread, stage / S::kTurn * 16);
    }
  }
};

// A warp's part of a tile: its first channel and row of x within the tile, and its sums.
template <class S>
struct TileWarp {
  using T = typename S::T;
  static constexpr int kChannelTiles = S::kWarpChannels / 16, kRowTiles = S::kWarpRows / 8;
  int turns;  // warps that read the same x, of which this is number `turn`
  int turn, channel, row;
  bool busy;
  uint32_t seen = 0;
  Sum24<T> sum[kChannelTiles][kRowTiles][4] = {};

  __device__ TileWarp(const Sparse24Problem& p, const TileRing<S>& ring) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int left = (p.values.rows - ring.channel - 1) / S::kWarpChannels + 1;  // others have no channel
    turns = left < S::kChannels / S::kWarpChannels ? left : S::kChannels / S::kWarpChannels;
    turn = warp / 2;
    channel = turn * S::kWarpChannels;
    row = warp % 2 * S::kWarpRows;
    busy = ring.channel + channel < p.values.rows && ring.row + row < p.x.rows;
  }

  // Adds the products of stages `begin` to `end`. The warps with the same x watch it by turns.
  template <Places kPlaces>
  __device__ void multiply(const TileRing<S>& ring, int begin, int end) {
    int ahead = 0;  // the slot that is fetched next
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (begin + i < end) ring.fetch(begin + i, ahead);
      copy_async_commit();
      ++ahead;
    }
    int slot = 0;
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      copy_async_wait<S::kStages - 2>();
      __syncthreads();
      if (stage + S::kStages - 1 < end) ring.fetch(stage + S::kStages - 1, ahead);
      copy_async_commit();
      if (busy) {
        constexpr int kWords = 4 / S::kTurn;  // of metadata in a stage
        const uint32_t* metadata = reinterpret_cast<const uint32_t*>(ring.metadata_of(stage) + channel);
        const Bytes16* slots = ring.units + slot * S::kUnits;
        const Stage24<T, 4> at{slots + channel * 4, slots + S::kX + row * 8, metadata + stage % S::kTurn * kWords, 4};
        if (!kQuantised24<T> && kPlaces == Places::kKept && stage % turns == turn) {
          at.template multiply<kPlaces, !kQuantised24<T>>(sum, seen);
        } else {
          at.template multiply<kPlaces, false>(sum, seen);
        }
      }
      ahead = ahead + 1 == S::kStages ? 0 : ahead + 1;
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
    }
    __syncthreads();  // until all have read the ring
  }
};

template <class S>
__global__ void __launch_bounds__(S::kBlock, 1) sparse24_linear_fwd_kernel_tiles(Sparse24Problem p, int splits) {
  using T = typename S::T;
  Bytes16* shared = shared_memory<Bytes16>();
  uint32_t* special = reinterpret_cast<uint32_t*>(shared + S::kEnd);  // whether x has infinities or NaNs
  const TileOf tile(static_cast<int>(blockIdx.x) / splits, (p.values.rows - 1) / S::kChannels + 1,
                    (p.x.rows - 1) / S::kRows + 1);
  if (p.special != nullptr) {
    dependency_wait();
    // the tiles of rows that were watched and that have rows of this one
    const int last_row =
        tile.row * S::kRows + S::kRows - 1 < p.x.rows ? tile.row * S::kRows + S::kRows - 1 : p.x.rows - 1;
    const int begin = tile.row * S::kRows / p.special_rows * p.special_parts;
    const int end = (last_row / p.special_rows + 1) * p.special_parts;
    int32_t found = 0;
    for (int i = begin + static_cast<int>(threadIdx.x % 32); i < end; i += 32) found |= load_coherent(p.special + i);
    if (!vote_any(kFullWarp, found != 0)) return;
  }
  if (threadIdx.x == 0) store(special, 0u);
  const TileRing<S> ring{p, shared, tile.channel * S::kChannels, tile.row * S::kRows};

  // the block's stages: as many for each, and whole units of metadata
  const int all = (p.values.width + S::kStageBytes - 1) / S::kStageBytes;
  const int each = ((all + splits - 1) / splits + S::kTurn - 1) / S::kTurn * S::kTurn;
  const int begin = static_cast<int>(blockIdx.x) % splits * each, end = begin + each < all ? begin + each : all;

  TileWarp<S> warp(p, ring);
  warp.template multiply<Places::kKept>(ring, begin, end);
  if constexpr (!kQuantised24<T>) {
    if ((warp.seen & kWithoutEnd) != 0) atomic_max(special, 1u);
    __syncthreads();
    if (load(special) != 0) warp.template multiply<Places::kOthers>(ring, begin, end);
  }

  const int lane = static_cast<int>(threadIdx.x % 32);
  Sum24<T>* sums = reinterpret_cast<Sum24<T>*>(shared);  // in the ring's place
#pragma unroll
  for (int j = 0; j < warp.kChannelTiles; ++j) {
#pragma unroll
    for (int i = 0; i < warp.kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = warp.row + i * 8 + lane % 4 * 2 + r % 2;
        store(sums + row * S::kPitch + warp.channel + j * 16 + r / 2 * 8 + lane / 4, warp.sum[j][i][r]);
      }
    }
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (splits == 1) {
    __syncthreads();
    finish_tile<S, true>(p, sums, ring.channel, ring.row, splits, thread);
  } else {
    cluster_barrier();
    finish_tile<S, false>(p, sums, ring.channel, ring.row, splits, thread);
    cluster_barrier();  // until the others have read this block's sums
  }
}

// kStages of `few` fills 70 KB of shared memory: two blocks fit an A100 or H100 multiprocessor, with as much of the
// weight under way as int8_linear's.
template <class S>
void start_few(const Sparse24Problem& p, const Tensor& x, const DeviceLimits& limits) {
  using Sum = Sum24<typename S::T>;
  const TilePlan plan =
      plan_tiles(x, limits, S::kShared, ceil_div(p.values.rows, S::kChannels),
                 int64_t{S::kChannels} * (p.values.width + p.metadata.width), S::Sums::kOutputs * kThreads);
  const cudaStream_t stream = current_stream(x.get_device_index());
  if (kQuantised24<typename S::T> && limits.dependent_launch) {
    launch_dependent(sparse24_linear_fwd_kernel_few<S>, plan.grid, dim3(kThreads), S::kShared, stream, p,
                     plan.template meet<Sum>());
  } else {
    launch(sparse24_linear_fwd_kernel_few<S>, plan.grid, dim3(kThreads), S::kShared, stream, p,
           plan.template meet<Sum>());
  }
}

// How many blocks share the depth of each of `tiles`: as long as all run at once, and each has stages enough to be
// worth filling the ring and adding the sums.
int64_t splits_of(int64_t tiles, int64_t stages, const DeviceLimits& limits) {
  constexpr int64_t kFewStages = 4, kMostSplits = 8;
  int64_t splits = 1;
  while (limits.clusters && splits < kMostSplits && 2 * splits * tiles <= limits.multiprocessors &&
         2 * splits * kFewStages <= stages) {
    splits *= 2;
  }
  return splits;
}

template <class S>
void start_tiles(const Sparse24Problem& p, const Tensor& x, const DeviceLimits& limits) {
  const int64_t tiles = ceil_div(p.values.rows, S::kChannels) * ceil_div(p.x.rows, S::kRows);
  const int64_t splits = splits_of(tiles, ceil_div(p.values.width, S::kStageBytes), limits);
  BURNISH_CHECK(tiles * splits < (int64_t{1} << 31), "sparse24_linear.native: y has ", p.x.rows, " rows of ",
                p.values.rows, ", more than a grid holds");
  const dim3 grid(static_cast<unsigned>(tiles * splits));
  const cudaStream_t stream = current_stream(x.get_device_index());
  if (splits > 1) {
    launch_cluster(sparse24_linear_fwd_kernel_tiles<S>, grid, dim3(S::kBlock), static_cast<unsigned>(splits),
                   S::kShared, stream, p, static_cast<int>(splits));
  } else {
    launch(sparse24_linear_fwd_kernel_tiles<S>, grid, dim3(S::kBlock), S::kShared, stream, p, 1);
  }
}

// The time that all tiles take by the kernel of sparse24_wide.cuh, in bytes of shared memory for each of their stages:
// that is what it waits for.
template <class S>
int64_t wide_cost(const Sparse24Problem& p, const DeviceLimits& limits) {
  const int64_t tiles = ceil_div(p.x.rows, S::kRows) * ceil_div(p.values.rows, S::kCluster * S::kChannels);
  return ceil_div(tiles, std::max(1, limits.multiprocessors / S::kCluster)) * S::kMoved;
}

// Launches the kernel of sparse24_wide.cuh, which leaves out what x's infinities and NaNs make of the places that the
// weight does not keep, and behind it the one that does all again for tiles of rows that have any.
template <class S>
void start_wide(Sparse24Problem p, const Tensor& x, const DeviceLimits& limits) {
  constexpr int64_t kMostWatchers = 16;
  const int64_t row_tiles = ceil_div(p.x.rows, S::kRows), across = ceil_div(p.values.rows, S::kChannels);
  const int64_t tiles = row_tiles * ceil_div(across, S::kCluster);
  BURNISH_CHECK(tiles < (int64_t{1} << 31), "sparse24_linear.native: y has ", p.x.rows, " rows of ", p.values.rows,
                ", more than a kernel counts");
  const int64_t splits = !S::kSplits ? 1 : splits_of(tiles, ceil_div(p.values.width, S::kValueBytes), limits);
  const int64_t cluster = S::kCluster * splits, places = std::max<int64_t>(1, limits.multiprocessors / cluster);
  const dim3 grid(static_cast<unsigned>(std::min(tiles, places) * cluster));
  const WideMaps maps = wide_maps<S>(p);
  const cudaStream_t stream = current_stream(x.get_device_index());
  Tensor special;
  if constexpr (!kQuantised24<typename S::T>) {
    p.special_rows = S::kRows;
    p.special_parts = static_cast<int>(std::min(across, kMostWatchers) * splits);
    special = torch::stable::new_empty(x, {row_tiles * p.special_parts}, ScalarType::Int);
    p.special = special.mutable_data_ptr<int32_t>();
  }
  if (cluster > 1) {
    launch_cluster(sparse24_linear_fwd_kernel_wide<S>, grid, dim3(S::kBlock), static_cast<unsigned>(cluster),
                   S::kShared, stream, p, maps, static_cast<int>(splits));
  } else {
    launch(sparse24_linear_fwd_kernel_wide<S>, grid, dim3(S::kBlock), S::kShared, stream, p, maps, 1);
  }
  if constexpr (!kQuantised24<typename S::T>) {
    using Again = Tiles<typename S::T, 128, 4>;
    const int64_t again = ceil_div(p.values.rows, Again::kChannels) * ceil_div(p.x.rows, Again::kRows);
    launch_dependent(sparse24_linear_fwd_kernel_tiles<Again>, dim3(static_cast<unsigned>(again)), dim3(Again::kBlock),
                     Again::kShared, stream, p, 1);
  }
}

// A tile of 128 rows takes 140 KB of shared memory, which the smaller GPUs of the sm_80 class do not have: they take
// tiles of 64 rows, in 84 KB. For few rows a tile of 32 channels halves how often x is read from L2, which pays where
// there are tiles enough for most multiprocessors.
template <class T>
void start(const Sparse24Problem& p, const Tensor& x, const DeviceLimits& limits) {
  using LargeTiles = Tiles<T, 128, 4>;
  const bool many_channels = p.values.rows >= 24 * int64_t{limits.multiprocessors};
  if (p.x.rows > kWideRows && wide24_takes(p, limits)) {
    using Small = Wide24<T, 1, 128, 1>;
    using Large = Wide24<T, 2, 128, 2>;
    using Largest = Wide24<T, 2, kMostWideRows, 2>;
    const int64_t of_small = wide_cost<Small>(p, limits), of_large = wide_cost<Large>(p, limits);
    const int64_t of_largest = wide_cost<Largest>(p, limits);
    if (of_small <= std::min(of_large, of_largest)) return start_wide<Small>(p, x, limits);
    return of_large < of_largest ? start_wide<Large>(p, x, limits) : start_wide<Largest>(p, x, limits);
  }
  if (p.x.rows > kFewRows) {
    const bool large = p.x.rows > 64 && limits.shared_memory > static_cast<int>(LargeTiles::kShared);
    return large ? start_tiles<LargeTiles>(p, x, limits) : start_tiles<Tiles<T, 64, 3>>(p, x, limits);
  }
  if (p.x.rows > 8) return start_few<Few<T, 2, 2, 2>>(p, x, limits);
  return many_channels ? start_few<Few<T, 1, 2, 2>>(p, x, limits) : start_few<Few<T, 1, 1, 4>>(p, x, limits);
}

Tensor sparse24_linear(const Tensor& x, const Tensor& values, const Tensor& metadata,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "sparse24_linear";
  BURNISH_CHECK(x.dim() >= 1, "sparse24_linear.native: x is a scalar, expected [..., K]");
  const DeviceGuard guard(x.get_device_index());
  const Rows rows = as_rows(x);
  const int64_t channels = values.dim() == 2 ? values.size(0) : 0, width = round_up(rows.width, 8);
  const ScalarType type = values.scalar_type();
  const bool quantised = type == ScalarType::Char;
  BURNISH_CHECK(quantised || (type == x.scalar_type() && type != ScalarType::Float), "sparse24_linear.native: values",
                " are not int8, nor bf16 or fp16 as x is");
  BURNISH_CHECK(values.dim() == 2 && values.size(1) == width / 2, "sparse24_linear.native: values are not [N, ",
                width / 2, "]");
  BURNISH_CHECK(metadata.scalar_type() == ScalarType::Byte && metadata.dim() == 2 && metadata.size(0) == channels &&
                    metadata.size(1) == width / 8,
                "sparse24_linear.native: metadata is not uint8 [", channels, ", ", width / 8, "]");
  BURNISH_CHECK(quantised == scale.has_value() &&
                    (!scale || (scale->scalar_type() == ScalarType::Float && scale->numel() == channels)),
                "sparse24_linear.native: scale is not fp32 [", channels, "] for int8 values, None for others");
  BURNISH_CHECK(width <= kMaxWidth, "sparse24_linear.native: K is ", rows.width, ", expected at most ", kMaxWidth);
  BURNISH_CHECK(rows.count <= kMaxRows, "sparse24_linear.native: x has ", rows.count, " rows, expected at most ",
                kMaxRows);
  BURNISH_CHECK(channels <= kMaxChannels, "sparse24_linear.native: N is ", channels, ", expected at most ",
                kMaxChannels);
  BURNISH_CHECK(!bias || bias->numel() == channels, "sparse24_linear.native: bias has not N = ", channels, " elements");
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, channels));
  if (y.numel() == 0) return y;

  const Tensor kept = aligned(values), places = aligned(metadata);
  const std::optional<Tensor> scales = scale ? std::optional(torch::stable::contiguous(*scale)) : std::nullopt;
  const std::optional<Tensor> offsets = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  Sparse24Problem p{};
  p.values = operand_of({kept, channels, width / 2, width / 2}, quantised ? 1 : 2);
  p.metadata = operand_of({places, channels, width / 8, width / 8}, 1);
  p.scale = scales ? scales->const_data_ptr<float>() : nullptr;
  p.bias = offsets ? offsets->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.bias_format = offsets ? format_of(offsets->scalar_type(), kOp, "bias") : Format::kFloat;
  p.y_format = format_of(x.scalar_type(), kOp, "x");

  const DeviceLimits limits = device_limits(x.get_device_index());
  if (!quantised) {
    p.x = operand_of(rows, 2);
    type == ScalarType::BFloat16 ? start<bf16>(p, x, limits) : start<fp16>(p, x, limits);
    return y;
  }
  const int64_t padded = round_up(rows.width, kRowPadding);
  const Tensor q = torch::stable::new_empty(x, {rows.count, padded}, ScalarType::Char);
  // longer than x by what a tile may lie beyond it: what is read there is not stored
  const Tensor row_scale = torch::stable::new_empty(x, {rows.count + kMostWideRows}, ScalarType::Float);
  p.x = operand_of({q, rows.count, padded, padded}, 1);
  p.row_scale = row_scale.const_data_ptr<float>();
  quantize_rows(rows, q.mutable_data_ptr<int8_t>(), padded, row_scale.mutable_data_ptr<float>(),
                current_stream(x.get_device_index()));
  start<int8_t>(p, x, limits);
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("sparse24_linear.native", TORCH_BOX(&burnish::sparse24_linear));
}
