// The host's side of lowrank.cuh: what a call brings, and how many blocks share it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cuda/counters.cuh"
#include "cuda/lowrank.cuh"
#include "math/pack.h"
#include "rows.h"

namespace burnish {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxLowRankRows = 64;
constexpr int64_t kMaxLowBytes = 16 << 10;        // of s: burnish/ops/lowrank_linear.py knows it too
constexpr int64_t kMaxLowRankWidth = 1 << 28;     // 32 bits count the bytes of a row
constexpr int64_t kMaxLowRankChannels = 1 << 30;  // and the channels past the last tile
// The parts of s, written and read, may make this share of what is moved anyway: they are the price of more blocks that
// read A, and every block waits for all of them.
constexpr int64_t kPartsShare = 64;

// The checked operands of a call.
struct LowRankCall {
  Rows x, A, B;
  std::optional<Tensor> bias;
  const Tensor& input;
  int64_t element;  // bytes

  LowRankCall(const char* op, const Tensor& input, const Tensor& down, const Tensor& up,
              const std::optional<Tensor>& offset);

  // Copies x, A or B where their rows are whole units of 16 bytes but do not lie at multiples of them.
  void align();
  // What the kernel of lowrank.cuh asks.
  void expect_few_rows(const char* op) const;

  Tensor new_result() const { return torch::stable::new_empty(input, sizes_with_last(input, B.count)); }
  LowRankProblem problem(Tensor& y, double factor) const;

  // run.operator()<T, Shape>() for x's type and rows. Fewer than two row tiles leave the channels in tiles of 16, for
  // more blocks; from there on a tile of 32 halves how often x is read from L2. The stages fill 48 to 72 KB of shared
  // memory: with s and the sums they fit the smaller GPUs' 99 KB, and two blocks an A100 or H100 multiprocessor.
  template <class Run>
  void start(const Run& run) const {
    switch (input.scalar_type()) {
      case ScalarType::Float:
        return start_rows<float>(run);
      case ScalarType::BFloat16:
        return start_rows<bf16>(run);
      default:
        return start_rows<fp16>(run);
    }
  }

 private:
  template <class T, class Run>
  void start_rows(const Run& run) const {
    if (x.count <= 8) return run.template operator()<T, Shape<1, 1, 128, 5>>();
    if (x.count <= 16) return run.template operator()<T, Shape<2, 1, 128, 4>>();
    if (x.count <= 32) return run.template operator()<T, Shape<4, 2, 64, 4>>();
    return run.template operator()<T, Shape<8, 2, 64, 3>>();
  }
};

inline LowRankCall::LowRankCall(const char* op, const Tensor& input, const Tensor& down, const Tensor& up,
                                const std::optional<Tensor>& offset)
    : input(input) {
  BURNISH_CHECK(input.dim() >= 1, op, ".native: x is a scalar, expected [..., K]");
  format_of(input.scalar_type(), op, "x");
  BURNISH_CHECK(down.dim() == 2 && up.dim() == 2 && down.scalar_type() == input.scalar_type() &&
                    up.scalar_type() == input.scalar_type(),
                op, ".native: A and B are not matrices in x's dtype");
  x = as_rows(input);
  A = as_rows(down);
  B = as_rows(up);
  element = input.scalar_type() == ScalarType::Float ? 4 : 2;
  BURNISH_CHECK(A.width == x.width && B.width == A.count, op, ".native: A is [", A.count, ", ", A.width, "] and B [",
                B.count, ", ", B.width, "], expected [R, ", x.width, "] and [N, R]");
  BURNISH_CHECK(x.width <= kMaxLowRankWidth, op, ".native: K is ", x.width, ", expected at most ", kMaxLowRankWidth);
  BURNISH_CHECK(B.count <= kMaxLowRankChannels, op, ".native: N is ", B.count, ", expected at most ",
                kMaxLowRankChannels);
  BURNISH_CHECK(!offset || offset->numel() == B.count, op, ".native: bias has not N = ", B.count, " elements");
  if (offset) {
    format_of(offset->scalar_type(), op, "bias");
    bias = torch::stable::contiguous(*offset);
  }
}

inline void LowRankCall::align() {
  for (Rows* rows : {&x, &A, &B}) *rows = aligned_rows(*rows, element);
}

inline void LowRankCall::expect_few_rows(const char* op) const {
  BURNISH_CHECK(x.count <= kMaxLowRankRows, op, ".native: x has ", x.count, " rows, expected at most ",
                kMaxLowRankRows);
  BURNISH_CHECK(x.count * A.count * element <= kMaxLowBytes, op, ".native: s has ", x.count, " rows of ", A.count,
                ", expected at most ", kMaxLowBytes, " bytes");
}

inline LowRankProblem LowRankCall::problem(Tensor& y, double factor) const {
  LowRankProblem p{};
  p.x = operand_of(x, element);
  p.A = operand_of(A, element);
  p.B = operand_of(B, element);
  p.y = y.mutable_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.bias_format = bias ? format_of(bias->scalar_type(), "", "bias") : Format::kFloat;
  p.factor = static_cast<float>(factor);
  p.rank = static_cast<int>(A.count);
  return p;
}

// Plans and starts a kernel whose body is lowrank_forward<T, ..., S>; fills in what the plan decides.
template <class T, class S>
void start_lowrank(void (*kernel)(LowRankProblem), LowRankProblem p, const Tensor& x) {
  const auto bytes = [](const Operand& of) { return int64_t{of.rows} * of.width; };
  p.padded_rank = static_cast<int>(round_up(p.rank, 8));
  p.rank_tiles = static_cast<int>(ceil_div(p.rank, S::kChannels));
  p.tiles = static_cast<int>(ceil_div(p.B.rows, S::kChannels));
  // an odd number of half cache lines, so that a warp reads two rows from different banks
  p.low_pitch = (p.padded_rank * static_cast<int>(sizeof(T)) + 191) / 128 * 8 - 4;
  const size_t units = S::kUnits + S::Sums::kWords / 4 + static_cast<size_t>(p.x.rows * p.low_pitch);
  const size_t shared = units * sizeof(Bytes16);
  const int64_t places = resident_blocks(kernel, dim3(kThreads), shared, x.get_device_index());

  const int64_t turns = ceil_div(p.A.width, S::kTurn);
  const int64_t part = int64_t{p.x.rows} * p.padded_rank * static_cast<int64_t>(sizeof(float));
  const int64_t moved = bytes(p.x) + bytes(p.A) + bytes(p.B) + bytes(p.base);
  const int64_t most = std::min(moved / (kPartsShare * 2 * part), places / p.rank_tiles);
  const int64_t each = std::max<int64_t>(1, ceil_div(turns, std::max<int64_t>(1, most)));  // turns of a part
  p.parts_count = static_cast<int>(ceil_div(turns, each));
  p.part_bytes = static_cast<int>(std::min<int64_t>(each * S::kTurn, kMaxLowRankWidth * 4));
  const Tensor parts = torch::stable::new_empty(x, {p.parts_count * part}, ScalarType::Char);
  const Counters counters = counters_of(x);
  p.parts = static_cast<float*>(parts.mutable_data_ptr());
  p.counter = counters.barrier();

  const int64_t downs = int64_t{p.rank_tiles} * p.parts_count;
  const int64_t even = ceil_div(p.tiles, ceil_div(p.tiles, places));  // as many as share the tiles evenly
  const dim3 grid(static_cast<unsigned>(std::max(even, std::min(downs, places))));
  launch_cooperative(kernel, grid, dim3(kThreads), shared, current_stream(x.get_device_index()), p);
}

}  // namespace burnish
