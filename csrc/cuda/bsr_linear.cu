// bsr_linear in CUDA C++, for more than 64 rows of x and blocks of 128 by 128, bf16 and fp16, on sm_90: the kernel of
// bsr_wide.cuh. All else is Triton's.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "cuda/bsr_wide.cuh"
#include "cuda/counters.cuh"
#include "cuda/warpgroup.cuh"
#include "math/pack.h"
#include "rows.h"

namespace burnish {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kFewRows = 64, kAlignment = 8;  // burnish/ops/bsr_linear.py knows both
constexpr int64_t kMost = kMaxWideRows;           // columns too: 32 bits count the bytes of a row
constexpr int64_t kMaxBlocks = 1 << 22;           // rows of values are rows as well

// An index of `size` elements, one after the other.
Tensor index_of(const Tensor& indices, const char* name, int64_t size) {
  BURNISH_CHECK(indices.scalar_type() == ScalarType::Int && indices.numel() == size, "bsr_linear.native: ", name,
                " is not int32 [", size, "]");
  return torch::stable::contiguous(indices);
}

template <class S>
void start(BsrProblem p, const Operand& values, void* y, const Tensor& x) {
  constexpr int64_t kCluster = S::kCluster;
  const int64_t tiles = ceil_div(p.x.rows, kCluster * S::kRows) * ceil_div(p.channels, kWideChannels);
  BURNISH_CHECK(tiles <= kMost, "bsr_linear.native: y has ", p.x.rows, " rows of ", p.channels,
                ", more than a kernel counts");
  const Counters counters = counters_of(x);
  p.ticket = counters.tickets();
  const auto map = [](const Operand& of, int rows) { return wide_map(of, rows, S::kStageBytes, Swizzle::k128); };
  const WideBsrMaps maps{map(p.x, S::Ring::kXRows), map(values, S::Ring::kWRows),
                         wide_map_of_y(y, p.x.rows, p.channels)};
  const int64_t places = std::max<int64_t>(1, device_limits(x.get_device_index()).multiprocessors / kCluster);
  const dim3 grid(static_cast<unsigned>(std::min(tiles, places) * kCluster)), block(kWideBlock);
  const cudaStream_t stream = current_stream(x.get_device_index());
  const auto kernel = bsr_linear_fwd_kernel_wide<S>;
  if (kCluster > 1) {
    launch_cluster(kernel, grid, block, kCluster, S::kShared, stream, p, maps);
  } else {
    launch(kernel, grid, block, S::kShared, stream, p, maps);
  }
}

// An odd tile of rows makes a pair with one that does not exist. Of few, that costs more than pairs gain, by the count
// in bsr_wide.cuh.
template <class T, int kRows>
void start_rows(const BsrProblem& p, const Operand& values, void* y, const Tensor& x) {
  constexpr int64_t kFewTiles = 3;
  const int64_t tiles = ceil_div(p.x.rows, kRows);
  const bool pairs = tiles % 2 == 0 || tiles > kFewTiles;
  pairs ? start<WideBsr<T, kRows, 2>>(p, values, y, x) : start<WideBsr<T, kRows, 1>>(p, values, y, x);
}

template <class T>
void start_type(const BsrProblem& p, const Operand& values, void* y, const Tensor& x) {
  const int64_t tiles = ceil_div(p.x.rows, 256) * ceil_div(p.channels, kWideChannels);
  const bool few = tiles < device_limits(x.get_device_index()).multiprocessors;
  few ? start_rows<T, 128>(p, values, y, x) : start_rows<T, 256>(p, values, y, x);
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices,
                  const Tensor& /*transposed*/, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                  int64_t N) {
  constexpr const char* kOp = "bsr_linear";
  BURNISH_CHECK(x.dim() >= 1, "bsr_linear.native: x is a scalar, expected [..., K]");
  const DeviceGuard guard(x.get_device_index());
  const Rows rows = aligned_rows(as_rows(x), 2);
  const ScalarType type = x.scalar_type();
  BURNISH_CHECK((type == ScalarType::BFloat16 || type == ScalarType::Half) && values.scalar_type() == type && !scale,
                "bsr_linear.native: x and values are not both bf16 or both fp16, without a scale");
  BURNISH_CHECK(values.dim() == 3 && values.size(1) == kWideChannels && values.size(2) == kWideChannels,
                "bsr_linear.native: values are not [nnzb, ", kWideChannels, ", ", kWideChannels, "]");
  const int64_t blocks = values.size(0);
  BURNISH_CHECK(rows.count > kFewRows && rows.width > 0 && N > 0 && rows.width % kAlignment == 0 && N % kAlignment == 0,
                "bsr_linear.native: x has ", rows.count, " rows, K is ", rows.width, " and N ", N,
                ", expected more than ", kFewRows, " and multiples of ", kAlignment);
  BURNISH_CHECK(std::max({rows.count, rows.width, N}) <= kMost && blocks <= kMaxBlocks, "bsr_linear.native: x has ",
                rows.count, " rows, K is ", rows.width, " and N ", N, ", with ", blocks, " blocks, expected at most ",
                kMost, " of each and ", kMaxBlocks, " blocks");
  BURNISH_CHECK(device_limits(x.get_device_index()).warpgroups, "bsr_linear.native: the GPU is not sm_90");
  BURNISH_CHECK(!bias || bias->numel() == N, "bsr_linear.native: bias has not N = ", N, " elements");
  const Tensor starts = index_of(crow_indices, "crow_indices", ceil_div(N, kWideChannels) + 1);
  const Tensor columns = index_of(col_indices, "col_indices", blocks);
  const Tensor kept = aligned(values);
  const std::optional<Tensor> offsets = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;

  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, N));
  BsrProblem p{};
  p.x = operand_of(rows, 2);
  p.starts = starts.const_data_ptr<int32_t>();
  p.columns = columns.const_data_ptr<int32_t>();
  p.bias = offsets ? offsets->const_data_ptr() : nullptr;
  p.bias_format = offsets ? format_of(offsets->scalar_type(), kOp, "bias") : Format::kFloat;
  p.channels = static_cast<int>(N);
  // a map is of something: without any blocks of x, of which the kernel then fetches nothing either
  const Operand all = blocks > 0 ? operand_of({kept, blocks * kWideChannels, kWideChannels, kWideChannels}, 2) : p.x;
  type == ScalarType::BFloat16 ? start_type<bf16>(p, all, y.mutable_data_ptr(), x)
                               : start_type<fp16>(p, all, y.mutable_data_ptr(), x);
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("bsr_linear.native", TORCH_BOX(&burnish::bsr_linear));
}
