// A product by two thin factors, and a base weight beside it, for at most 64 rows of x, in one launch:
//
//   s = factor (keep * x) A^T     y = x W^T + bias + s B^T
//
// x, A, W and B come from memory once each. A block works through a list of segments, all of which are products of some
// rows of a weight and a range of depth, streamed through one ring of its own:
//
//   down   a tile of A's rows and one part of K: a part of s, to global memory. So few that they fill some of the
//   blocks base   a tile of W's rows, all of K                                                        } for each of the
//   up     the same tile of B's rows, all of R: added to the same sums, which are then stored  } block's tiles
//
// All blocks wait for each other once, before the first `up`: then each adds the parts of s, always in the same order,
// and keeps s, rounded, in shared memory. The ring is meanwhile fetching what comes next, and the base of the first
// tile is done, so that the wait costs a launch with a base nothing. The grid is cooperative, at most what the device
// holds.
//
// The ring is a warp's own (see few_rows.cuh): warps share the depth of a tile, each takes every fourth stage.
#pragma once

#include <type_traits>

#include "cuda/few_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/operand.cuh"
#include "cuda/ptx.cuh"
#include "math/philox.h"

namespace burnish {

struct LowRankProblem {
  Operand x, A, B;
  Operand base, base_x;    // W and what it multiplies: x, or x quantised
  const float* row_scale;  // [rows], of a quantised base
  const float* scale;      // [channels], likewise
  const void* bias;        // [channels], or null
  void* y;                 // [rows, channels]
  float* parts;            // [parts, rows, padded_rank]
  uint32_t* counter;       // of the grid's barrier
  const int64_t* seed;     // of the dropout, null without
  uint32_t threshold;
  float factor;
  int rank;
  int padded_rank;  // a multiple of 8
  int low_pitch;    // units from a row of s to the next in shared memory
  int parts_count;
  int part_bytes;  // of K
  int rank_tiles;
  int tiles;
  Format bias_format;
};

// kRowTiles: 8 rows of x each. kChannelTiles: 16 channels each. A stage is kStageBytes of each row, one or two steps.
template <int kRowTiles_, int kChannelTiles_, int kStageBytes_, int kStages_>
struct Shape {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kChannelTiles = kChannelTiles_;
  static constexpr int kStageBytes = kStageBytes_;
  static constexpr int kStages = kStages_;
  static constexpr int kChannels = 16 * kChannelTiles;
  static constexpr int kTurn = kWarps * kStageBytes;  // bytes of depth that the warps take together
  static constexpr int kSteps = kStageBytes / 64;
  static constexpr int kWeightUnits = 2 * kChannelTiles;
  static constexpr int kSlots = kSteps * (kWeightUnits + kRowTiles);  // of 32 units, in a stage
  static constexpr int kUnits = kWarps * kStages * kSlots * 32;
  using Sums = Gather<float, 1, kChannelTiles>;
};

struct NoBase {};

enum class Kind : int { kDown, kBase, kUp };

struct Segment {
  Operand weight, x;  // the rows that remain, and none of x for `up`, which multiplies s
  Kind kind;
  int tile, part;
  int begin, end;  // bytes of depth
};

// The segments of a block, in order.
template <class S, bool kHasBase>
struct Segments {
  static constexpr int kEach = kHasBase ? 2 : 1;
  const LowRankProblem& p;
  int downs;  // this block's
  int count;

  __device__ explicit Segments(const LowRankProblem& p) : p(p) {
    downs = own(p.rank_tiles * p.parts_count);
    count = downs + kEach * own(p.tiles);
  }

  // Of `all` things, how many are this block's, which takes every gridDim.x-th.
  __device__ static int own(int all) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    return all > block ? (all - 1 - block) / blocks + 1 : 0;
  }

  __device__ static Operand below(const Operand& from, int row) {
    return {from.data + row * from.stride, from.stride, from.rows - row, from.width, from.aligned};
  }

  __device__ Segment at(int i) const {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    if (i < downs) {
      const int unit = block + i * blocks, tile = unit % p.rank_tiles, part = unit / p.rank_tiles;
      const int begin = part * p.part_bytes, end = begin + p.part_bytes < p.A.width ? begin + p.part_bytes : p.A.width;
      return {below(p.A, tile * S::kChannels), p.x, Kind::kDown, tile, part, begin, end};
    }
    const int tile = block + (i - downs) / kEach * blocks;
    if (kHasBase && (i - downs) % kEach == 0) {
      return {below(p.base, tile * S::kChannels), p.base_x, Kind::kBase, tile, 0, 0, p.base.width};
    }
    return {below(p.B, tile * S::kChannels), Operand{nullptr, 0, 0, 0, true}, Kind::kUp, tile, 0, 0, p.B.width};
  }
};

// What a warp fetches next: a stage of the block's segment number `index`.
template <class S>
struct Cursor {
  Segment segment;
  int index, k;

  __device__ static int first(const Segment& segment) {
    return segment.begin + static_cast<int>(threadIdx.x / 32) * S::kStageBytes;
  }
  // Every warp takes as many stages, of zeros at last.
  __device__ static int turns(const Segment& segment) { return (segment.end - segment.begin - 1) / S::kTurn + 1; }

  template <class All>
  __device__ void enter(const All& all, int i) {
    index = i;
    if (i >= all.count) return;
    segment = all.at(i);
    k = first(segment);
  }
  template <class All>
  __device__ void advance(const All& all) {
    k += S::kTurn;
    if (k >= first(segment) + turns(segment) * S::kTurn) enter(all, index + 1);
  }
};

// A warp's stages, in slots of 32 units: of the weight [step][8 channels], then of x [step][8 rows]. In a slot, unit
// 4 row + column. kElement: bytes of an element of T, for rows that are not aligned.
template <class S, int kElement>
struct LowRankRing {
  using Element = std::conditional_t<kElement == 2, uint16_t, uint32_t>;
  Bytes16* units;   // the warp's
  int row, column;  // the lane's unit in each slot, which it fetches: row of 8, byte of 64

  __device__ Bytes16* weight(int stage, int step, int i) const {
    return units + (stage * S::kSlots + step * S::kWeightUnits + i) * 32;
  }
  __device__ Bytes16* x(int stage, int step, int i) const {
    return units + (stage * S::kSlots + S::kSteps * S::kWeightUnits + step * S::kRowTiles + i) * 32;
  }
  __device__ int own() const { return row * 4 + column / 16; }

  __device__ void fetch(const Segment& from, int k, int stage, uint64_t policy) const {
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const int byte = k + step * 64 + column;
#pragma unroll
      for (int i = 0; i < S::kWeightUnits; ++i) {
        Bytes16* slot = weight(stage, step, i) + own();
        const int at = i * 8 + row;
        if (from.weight.aligned) {
          copy_async16(slot, from.weight.data + at * from.weight.stride + byte,
                       at < from.weight.rows && byte < from.end, policy);
        } else {
          store(slot, by_elements<Element>(from.weight, at, byte, from.end));
        }
      }
      if (from.kind == Kind::kUp) continue;
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        Bytes16* slot = x(stage, step, i) + own();
        const int at = i * 8 + row;
        if (from.x.aligned) {
          copy_async16(slot, from.x.data + at * from.x.stride + byte, at < from.x.rows && byte < from.end);
        } else {
          store(slot, by_elements<Element>(from.x, at, byte, from.end));
        }
      }
    }
  }

  // Zeros where x drops out, in the lane's units. A call of the generator decides one unit of 16-bit elements, or two
  // of fp32.
  __device__ void drop_out(const LowRankProblem& p, uint64_t seed, int k, int stage) const {
    constexpr int kUnitElements = 16 / kElement;
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const int element = (k + step * 64 + column) / kElement;
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        if (i * 8 + row >= p.x.rows) continue;
        const uint32_t kept = kept_bits(dropout_words(seed, i * 8 + row, element / kDropoutGroup), p.threshold) >>
                              element % kDropoutGroup;
        Bytes16* slot = x(stage, step, i) + own();
        Bytes16 unit = load(slot);
#pragma unroll
        for (int e = 0; e < kUnitElements; ++e) {
          const uint32_t mask = (kElement == 4 ? ~0u : 0xffffu) << e * kElement % 4 * 8;
          if ((kept >> e & 1) == 0) unit.word[e * kElement / 4] &= ~mask;
        }
        store(slot, unit);
      }
    }
  }
};

// s in shared memory, [rows, padded_rank] of T.
template <class T>
struct Low {
  Bytes16* units;
  int pitch;  // units of a row

  // Adds the parts that all blocks wrote.
  __device__ void collect(const LowRankProblem& p) const {
    const int row_units = p.padded_rank / 4, all = p.x.rows * row_units;
    const Bytes16* parts = reinterpret_cast<const Bytes16*>(p.parts);
    for (int unit = static_cast<int>(threadIdx.x); unit < all; unit += kThreads) {
      float total[4] = {};
#pragma unroll 4
      for (int part = 0; part < p.parts_count; ++part) {
        const Bytes16 of_part = load_coherent(parts + (static_cast<int64_t>(part) * all + unit));
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += bits_float(of_part.word[i]);
      }
      const int row = unit / row_units, r = unit % row_units * 4;
      struct alignas(4 * sizeof(T)) {
        T value[4];
      } rounded;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // padding would be NaN where x is infinite or the factor is
        rounded.value[i] = from_float<T>(r + i < p.rank ? p.factor * total[i] : 0.0f);
      }
      store(reinterpret_cast<decltype(rounded)*>(reinterpret_cast<T*>(units + row * pitch) + r), rounded);
    }
    __syncthreads();
  }

  __device__ Bytes16 unit(const LowRankProblem& p, int row, int byte, int end) const {
    return row < p.x.rows && byte < end ? load(units + (row * pitch + byte / 16)) : Bytes16{};
  }
};

// A block's work. T: of x, A, B and y. Base: of the base weight: T, int8_t or NoBase.
template <class T, class Base, class S>
struct LowRankBlock {
  using Sums = typename S::Sums;
  static constexpr bool kQuantised = std::is_same_v<Base, int8_t>;
  static constexpr bool kShares = std::is_same_v<T, float>;  // lanes read what others fetched

  const LowRankProblem& p;
  LowRankRing<S, sizeof(T)> ring;
  float* words;  // where the warps' sums meet
  Low<T> low;
  float sum[S::kChannelTiles][S::kRowTiles][4];
  int32_t product[S::kChannelTiles][kQuantised ? S::kRowTiles : 1][4];  // of a quantised base

  __device__ LowRankBlock(const LowRankProblem& p, Bytes16* shared)
      : p(p),
        ring{shared + threadIdx.x / 32 * (S::kStages * S::kSlots * 32), static_cast<int>(threadIdx.x % 32 / 4),
             static_cast<int>(threadIdx.x % 4 * 16)},
        words(reinterpret_cast<float*>(shared + S::kUnits)),
        low{shared + S::kUnits + Sums::kWords / 4, p.low_pitch} {
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < S::kChannelTiles; ++j) {
#pragma unroll
      for (int i = 0; i < S::kRowTiles * 4; ++i) sum[j][i / 4][i % 4] = 0;
#pragma unroll
      for (int i = 0; i < (kQuantised ? S::kRowTiles * 4 : 4); ++i) product[j][i / 4][i % 4] = 0;
    }
  }

  __device__ void multiply_stage(const Segment& at, int k, int stage) {
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const int first = k + step * 64;
      if (first >= at.end) return;
      const auto weight = [&](int i, int row, int column) {
        return load(ring.weight(stage, step, i) + (row * 4 + column));
      };
      const auto x = [&](int i, int row, int column) {
        return at.kind == Kind::kUp ? low.unit(p, i * 8 + row, first + column * 16, at.end)
                                    : load(ring.x(stage, step, i) + (row * 4 + column));
      };
      if constexpr (kQuantised) {
        if (at.kind == Kind::kBase) {
          multiply<int8_t>(product, weight, x);
          continue;
        }
      }
      multiply<T>(sum, weight, x);
    }
  }

  // Stores a part of s, or a tile of y.
  __device__ void finish(const Segment& at) {
    const bool up = at.kind == Kind::kUp;
    const int channel = at.tile * S::kChannels + static_cast<int>(threadIdx.x) % S::kChannels;
    const bool inside = channel < (up ? p.B.rows : p.padded_rank);
    const float bias = up && inside && p.bias != nullptr ? load_as_float(p.bias, channel, p.bias_format) : 0.0f;
    const float scale = kQuantised && up && inside ? load(p.scale + channel) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      float total[Sums::kOutputs];
      int32_t whole[Sums::kOutputs];
      Sums::gather(words, sum, i, total);
      if constexpr (kQuantised) {
        if (up) Gather<int32_t, 1, S::kChannelTiles>::gather(reinterpret_cast<int32_t*>(words), product, i, whole);
      }
#pragma unroll
      for (int o = 0; o < Sums::kOutputs; ++o) {
        const int row = i * 8 + Sums::first_row() + o * Sums::kRowStep;
        if (!inside || row >= p.x.rows) continue;
        if (up) {
          float z = bias;
          if constexpr (kQuantised) z = static_cast<float>(whole[o]) * (load(p.row_scale + row) * scale) + bias;
          store(static_cast<T*>(p.y) + (static_cast<int64_t>(row) * p.B.rows + channel), from_float<T>(z + total[o]));
        } else {
          store(p.parts + ((static_cast<int64_t>(at.part) * p.x.rows + row) * p.padded_rank + channel), total[o]);
        }
      }
    }
    clear();
  }
};

// The body of a kernel of kThreads threads.
template <class T, class Base, class S>
__device__ void lowrank_forward(const LowRankProblem& p) {
  LowRankBlock<T, Base, S> block(p, shared_memory<Bytes16>());
  const Segments<S, !std::is_same_v<Base, NoBase>> segments(p);
  const uint64_t policy = evict_first_policy();
  const uint64_t seed = p.seed != nullptr ? static_cast<uint64_t>(load(p.seed)) : 0;

  Cursor<S> ahead{};
  ahead.enter(segments, 0);
  const auto fetch = [&](int stage) {
    if (ahead.index < segments.count) {
      block.ring.fetch(ahead.segment, ahead.k, stage, policy);
      ahead.advance(segments);
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < S::kStages; ++stage) fetch(stage);

  bool collected = false;
  int stage = 0;
  for (int index = 0; index < segments.count; ++index) {
    const Segment at = segments.at(index);
    if (at.kind == Kind::kUp && !collected) {
      grid_barrier(p.counter);
      block.low.collect(p);
      collected = true;
    }
    int k = Cursor<S>::first(at);
    for (int turn = Cursor<S>::turns(at); turn > 0; --turn, k += S::kTurn) {
      copy_async_wait<S::kStages - 1>();
      if (at.kind == Kind::kDown && p.seed != nullptr) block.ring.drop_out(p, seed, k, stage);
      if constexpr (block.kShares) __syncwarp();
      block.multiply_stage(at, k, stage);
      if constexpr (block.kShares) __syncwarp();
      fetch(stage);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    if (at.kind != Kind::kBase) block.finish(at);
  }
  if (!collected) grid_barrier(p.counter);
}

}  // namespace burnish
