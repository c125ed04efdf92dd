// int8_linear in CUDA C++ for at most 16 rows of x: streams the weight once, as fast as memory gives it.
//
//   launch 1   int8_quantize_rows: q [M, width], row scales [M]. At most 16 rows, so a few multiprocessors work
//   launch 2   int8_linear_fwd_kernel, which on sm_90 and later starts at once and fetches weights meanwhile
//
// Quantising inside every block instead would read x, at 2 bytes an element and with 12 instructions each, once for
// every 16 channels; with the second launch hidden there is nothing to gain by it.
//
// A block is four warps and takes 16 kChannelTiles channels at a time. The warps share a tile's K: each takes every
// fourth stage of 128 bytes a row, a full cache line, by cp.async into a ring of its own in shared memory. A lane reads
// back exactly the bytes that it copied, so the ring needs no barrier, and it has kStages stages under way however long
// the products take. At the end of a tile the warps' sums meet in shared memory; the ring is already fetching the
// block's next tile. Tensor cores (m16n8k32) take the channels as their 16 rows and x as their 8 columns: a byte of
// weight is then touched by one instruction for 8 rows of x, and at M = 1 dp4a would need as many cycles.
//
// Tiles are split as gather.cuh has it; partial sums are int32, exact.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "cuda/few_rows.cuh"
#include "cuda/int8_quantize_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "math/activation.h"
#include "math/pack.h"
#include "rows.h"

namespace burnish {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxRows = 16;
constexpr int kMaxWidth = 131072;      // int32 sums cannot overflow up to here
constexpr int kMaxChannels = 1 << 30;  // an int32 counts channels past the last tile of the last block
constexpr int kStageBytes = 128;
struct Problem {
  int8_t* q;             // [rows, width], zero beyond x's K; written by the first launch
  float* row_scale;      // [rows], likewise
  const int8_t* weight;  // [channels, width]
  const float* scale;    // [channels]
  const void* bias;      // [channels], or null
  void* y;               // [rows, channels]
  Splits<int32_t> splits;
  int width;  // a multiple of 16; 16 of the longest rows are 2 MB, so 32 bits index q
  int rows;
  int channels;
  Activation activation;
  Format bias_format;
  Format y_format;
};

using Cursor = TileCursor<kStageBytes>;

// kRowTiles: 8 rows of x each. kChannelTiles: 16 channels each. One stage of a warp's ring in 16-byte slots a lane:
// weights [half][row of 8 channels], then q [half][row tile], where a half is 64 of the stage's 128 bytes.
template <int kRowTiles, int kChannelTiles, int kStages>
struct Ring {
  static constexpr int kWeightRows = 2 * kChannelTiles;
  static constexpr int kSlots = 2 * (kWeightRows + kRowTiles);
  static constexpr int kUnits = kWarps * kStages * kSlots * 32;  // of 16 bytes, in a block

  const Problem& p;
  int tiles;
  int group;       // the lane's row within 8: a channel of the weight, a row of x
  int column;      // the lane's 16 bytes within a half of a stage
  Bytes16* slots;  // this lane's first

  __device__ Bytes16* slot(int stage, int i) const { return slots + (stage * kSlots + i) * 32; }

  __device__ void fetch_weight(const Cursor& at, int stage, uint64_t policy) const {
    if (at.tile >= tiles) return;
    const int channel = at.tile * (8 * kWeightRows) + group;
    const int8_t* first = p.weight + static_cast<int64_t>(channel) * p.width + (at.k + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool in_row = at.k + half * 64 + column < p.width;
#pragma unroll
      for (int i = 0; i < kWeightRows; ++i) {
        copy_async16(slot(stage, half * kWeightRows + i), first + (i * int64_t{8} * p.width + half * 64),
                     in_row && channel + i * 8 < p.channels, policy);
      }
    }
  }

  __device__ void fetch_q(const Cursor& at, int stage) const {
    if (at.tile >= tiles) return;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const Bytes16* source = q_source(at, i);
      copy_async16(slot(stage, 2 * kWeightRows + i), source, source != nullptr);
    }
  }

  // The first stages' q, by way of registers: a copy_async would complete after the weights of all stages.
  __device__ void fetch_first_q(Cursor at, int end) const {
    Bytes16 values[kStages][2 * kRowTiles];
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const Bytes16* source = at.tile < tiles ? q_source(at, i) : nullptr;
        values[stage][i] = source != nullptr ? load_coherent(source) : Bytes16{};
      }
      at.advance(end, p.splits.count);
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) store(slot(stage, 2 * kWeightRows + i), values[stage][i]);
    }
  }

  // Where the lane's 16 bytes of q for slot [half][row tile] lie; null for zeros.
  __device__ const Bytes16* q_source(const Cursor& at, int i) const {
    const int k = at.k + i / kRowTiles * 64 + column;
    const int row = i % kRowTiles * 8 + group;
    return k < p.width && row < p.rows ? reinterpret_cast<const Bytes16*>(p.q + row * p.width + k) : nullptr;
  }

  // sum[channel tile][row tile] += weight * q of a stage
  __device__ void multiply_stage(int stage, int32_t (&sum)[kChannelTiles][kRowTiles][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      multiply<int8_t>(
          sum, [&](int i, int, int) { return load(slot(stage, half * kWeightRows + i)); },
          [&](int i, int, int) { return load(slot(stage, 2 * kWeightRows + half * kRowTiles + i)); });
    }
  }
};

// At least two blocks a multiprocessor: one's epilogue and barriers leave the other's fetches running.
template <int kRowTiles, int kChannelTiles, int kStages>
__global__ void __launch_bounds__(kThreads, 2) int8_linear_fwd_kernel(Problem p) {
  using Fetch = Ring<kRowTiles, kChannelTiles, kStages>;
  using Sums = Gather<int32_t, kRowTiles, kChannelTiles>;
  Bytes16* shared = shared_memory<Bytes16>();
  int32_t* words = reinterpret_cast<int32_t*>(shared + Fetch::kUnits);
  uint32_t* ticket = reinterpret_cast<uint32_t*>(words + Sums::kWords);

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int tiles = (p.channels - 1) / Sums::kChannels + 1;
  const int steps = Cursor::steps(p.width, p.splits.count);
  const int end = steps * p.splits.count * (kWarps * kStageBytes);  // of k
  const Fetch ring{p, tiles, lane / 4, lane % 4 * 16, shared + warp * kStages * Fetch::kSlots * 32 + lane};
  const uint64_t policy = evict_first_policy();

  const Cursor first{static_cast<int>(blockIdx.x), Cursor::first_k()};
  Cursor ahead = first;
  if (steps > 0) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ring.fetch_weight(ahead, stage, policy);
      copy_async_commit();
      ahead.advance(end, p.splits.count);
    }
  }
  dependency_wait();
  if (steps > 0) ring.fetch_first_q(first, end);
  float row_scale[Sums::kOutputs];
#pragma unroll
  for (int o = 0; o < Sums::kOutputs; ++o) {
    const int row = Sums::first_row() + o * Sums::kRowStep;
    row_scale[o] = row < p.rows ? load_coherent(p.row_scale + row) : 0.0f;
  }

  int stage = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int channel = tile * Sums::kChannels + static_cast<int>(threadIdx.x) % Sums::kChannels;
    const bool inside = channel < p.channels;
    const float scale = inside ? load(p.scale + channel) : 0.0f;
    const float bias = inside && p.bias != nullptr ? load_as_float(p.bias, channel, p.bias_format) : 0.0f;

    int32_t sum[kChannelTiles][kRowTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 1>();
      ring.multiply_stage(stage, sum);
      ring.fetch_weight(ahead, stage, policy);
      ring.fetch_q(ahead, stage);
      copy_async_commit();
      ahead.advance(end, p.splits.count);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    int32_t total[Sums::kOutputs];
    Sums::gather(words, sum, 0, total);
    if (p.splits.count > 1 && !Sums::add_splits(p.splits, tile, ticket, total)) continue;
#pragma unroll
    for (int o = 0; o < Sums::kOutputs; ++o) {
      const int row = Sums::first_row() + o * Sums::kRowStep;
      if (!inside || row >= p.rows) continue;
      float z = static_cast<float>(total[o]) * (row_scale[o] * scale);
      if (p.bias != nullptr) z = z + bias;
      store_from_float(p.y, static_cast<int64_t>(row) * p.channels + channel, p.y_format, activate(z, p.activation));
    }
  }
}

// kStages fills 68 to 80 KB of shared memory: two blocks fit an A100 or H100 multiprocessor and one fits those with
// 99 KB. Two blocks then have 64 to 96 KB of weights under way, where 3.35 TB/s x 600 ns / 132 = 15 KB would do on an
// H100: what is left covers the tail, when part of the multiprocessors have run out of tiles.
template <int kRowTiles, int kChannelTiles, int kStages>
void start(Problem p, const Rows& x, const DeviceLimits& limits, cudaStream_t stream) {
  using Fetch = Ring<kRowTiles, kChannelTiles, kStages>;
  using Sums = Gather<int32_t, kRowTiles, kChannelTiles>;
  constexpr size_t kShared = Fetch::kUnits * sizeof(Bytes16) + (Sums::kWords + 1) * sizeof(int32_t);
  static_assert(kShared <= (99 << 10), "more shared memory than a block of the smaller GPUs gets");

  const int64_t tiles = ceil_div(p.channels, Sums::kChannels);
  const TilePlan plan =
      plan_tiles(x.tensor, limits, kShared, tiles, int64_t{Sums::kChannels} * p.width, Sums::kOutputs * kThreads);
  p.splits = plan.meet<int32_t>();
  quantize_rows(x, p.q, p.width, p.row_scale, stream);
  if (limits.dependent_launch) {
    launch_dependent(int8_linear_fwd_kernel<kRowTiles, kChannelTiles, kStages>, plan.grid, dim3(kThreads), kShared,
                     stream, p);
  } else {
    launch(int8_linear_fwd_kernel<kRowTiles, kChannelTiles, kStages>, plan.grid, dim3(kThreads), kShared, stream, p);
  }
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t activation, std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "int8_linear";
  BURNISH_CHECK(x.dim() >= 1, "int8_linear.native: x is a scalar, expected [..., K]");
  const DeviceGuard guard(x.get_device_index());
  const Rows rows = as_rows(x);
  const int64_t width = round_up(rows.width, kRowPadding);
  const int64_t channels = scale.numel();
  BURNISH_CHECK(rows.count <= kMaxRows, "int8_linear.native: x has ", rows.count, " rows, expected at most ", kMaxRows);
  BURNISH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 2 && weight.is_contiguous() &&
                    weight.size(0) == channels && weight.size(1) == width,
                "int8_linear.native: weight is not int8 [", channels, ", ", width, "], contiguous");
  BURNISH_CHECK(scale.scalar_type() == ScalarType::Float, "int8_linear.native: scale is not fp32");
  BURNISH_CHECK(rows.width <= kMaxWidth, "int8_linear.native: K is ", rows.width, ", expected at most ", kMaxWidth);
  BURNISH_CHECK(channels <= kMaxChannels, "int8_linear.native: N is ", channels, ", expected at most ", kMaxChannels);
  BURNISH_CHECK(!bias || bias->numel() == channels, "int8_linear.native: bias has not N = ", channels, " elements");
  BURNISH_CHECK(activation >= 0 && activation < kActivations, "int8_linear.native: activation is ", activation);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, channels), dtype);
  if (y.numel() == 0) return y;

  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
  const Tensor weights = aligned(weight) ? weight : torch::stable::clone(weight);
  const Tensor scales = torch::stable::contiguous(scale);
  const std::optional<Tensor> offsets = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const int64_t scale_bytes = rows.count * static_cast<int64_t>(sizeof(float));
  const Tensor quantised = torch::stable::new_empty(x, {rows.count * width + scale_bytes}, ScalarType::Char);
  int8_t* q = quantised.mutable_data_ptr<int8_t>();

  Problem p{};
  p.q = q;
  p.row_scale = reinterpret_cast<float*>(q + rows.count * width);
  p.weight = weights.const_data_ptr<int8_t>();
  p.scale = scales.const_data_ptr<float>();
  p.bias = offsets ? offsets->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.width = static_cast<int>(width);
  p.rows = static_cast<int>(rows.count);
  p.channels = static_cast<int>(channels);
  p.activation = static_cast<Activation>(activation);
  p.bias_format = offsets ? format_of(offsets->scalar_type(), kOp, "bias") : Format::kFloat;
  p.y_format = format_of(dtype, kOp, "out_dtype");

  const DeviceLimits limits = device_limits(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  // 16 rows of q for 16 channels of weight are as many bytes from L2 as from memory; for 32 channels they are half,
  // which pays where there are tiles enough for every multiprocessor
  if (rows.count <= 8) {
    start<1, 1, 6>(p, rows, limits, stream);
  } else if (channels < 32 * int64_t{limits.multiprocessors}) {
    start<2, 1, 4>(p, rows, limits, stream);
  } else {
    start<2, 2, 3>(p, rows, limits, stream);
  }
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("int8_linear.native", TORCH_BOX(&burnish::int8_linear));
}
