// lowrank_linear in CUDA C++: for at most 64 rows of x the kernel of lowrank.cuh without a base, for more of them the
// kernel of lowrank_wide.cuh, where it may be launched.
#include <torch/csrc/stable/library.h>

#include "cuda/lowrank_host.cuh"
#include "cuda/lowrank_wide.cuh"

namespace burnish {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2) lowrank_linear_fwd_kernel(LowRankProblem p) {
  lowrank_forward<T, NoBase, S>(p);
}

template <class S>
int64_t clusters_of(const LowRankProblem& p) {
  return ceil_div(p.x.rows, S::kRows * S::kTiles);
}

// How many clusters run at the same time.
template <class S>
int64_t places(const Tensor& x) {
  const int blocks = resident_blocks(lowrank_linear_fwd_kernel_wide<S>, dim3(kWideBlock), S::kShared,
                                     x.get_device_index(), S::kCluster);
  return std::max(1, blocks / S::kCluster);
}

// More clusters than there are multiprocessors for are not launched: they take tile after tile.
template <class S>
void start_wide(const LowRankProblem& p, const Tensor& x) {
  const auto map = [](const Operand& of, int rows) { return wide_map(of, rows, S::kLineBytes, Swizzle::k128); };
  const WideLowRankMaps maps{map(p.x, S::kRows), map(p.A, S::kRanks / S::kTiles), map(p.B, kWideChannels / S::kTiles),
                             wide_map_of_y(p.y, p.x.rows, p.B.rows)};
  const int64_t wanted = clusters_of<S>(p);
  const bool all = wanted * S::kCluster <= device_limits(x.get_device_index()).multiprocessors;
  const int64_t clusters = all ? wanted : std::min(wanted, places<S>(x));
  launch_cluster(lowrank_linear_fwd_kernel_wide<S>, dim3(static_cast<unsigned>(clusters * S::kCluster)),
                 dim3(kWideBlock), S::kCluster, S::kShared, current_stream(x.get_device_index()), p, maps);
}

// As many blocks as there are multiprocessors for: of the smallest tiles, then of the larger ones, which fetch A and B
// less often for a row, then by smaller clusters, which exchange less. Of many ranks these fetch them for two tiles at
// a time, where that leaves no block without rows and the device has room for as many of the then larger clusters.
template <class T, int kRanks>
void start_ranks(const LowRankProblem& p, const Tensor& x) {
  const int64_t multiprocessors = device_limits(x.get_device_index()).multiprocessors;
  const auto fits = [&](int rows, int cluster) { return ceil_div(p.x.rows, rows) * cluster <= multiprocessors; };
  if (fits(64, 8)) return start_wide<WideLowRank<T, 64, kRanks, 8>>(p, x);
  if (fits(128, 8)) return start_wide<WideLowRank<T, 128, kRanks, 8>>(p, x);
  using One = WideLowRank<T, 128, kRanks, 4>;
  if constexpr (kRanks == 128) {
    using Two = WideLowRank<T, 128, kRanks, 4, 2>;
    const auto rounds = [&]<class S>(S) { return ceil_div(clusters_of<S>(p), places<S>(x)); };
    if (clusters_of<One>(p) % 2 == 0 && rounds(Two()) <= rounds(One())) return start_wide<Two>(p, x);
  }
  start_wide<One>(p, x);
}

template <class T>
void start_many_rows(const LowRankProblem& p, const Tensor& x) {
  p.rank <= 64 ? start_ranks<T, 64>(p, x) : start_ranks<T, 128>(p, x);
}

Tensor lowrank_linear(const Tensor& x, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias) {
  LowRankCall call("lowrank_linear", x, A, B, bias);
  const bool many = call.x.count > kMaxLowRankRows;
  if (many) {
    const auto fits = [](int64_t size) { return size > 0 && size % 8 == 0; };
    BURNISH_CHECK(call.element == 2 && fits(call.x.width) && fits(call.B.count) && fits(call.A.count) &&
                      call.A.count <= kMaxWideLowRank && call.x.count <= kMaxWideRows &&
                      device_limits(x.get_device_index()).warpgroups,
                  "lowrank_linear.native: more than ", kMaxLowRankRows, " rows take bf16 or fp16, on sm_90, ",
                  "with K, N and R multiples of 8 and R at most ", kMaxWideLowRank);
    call.align();
  } else {
    call.expect_few_rows("lowrank_linear");
  }
  const DeviceGuard guard(x.get_device_index());
  Tensor y = call.new_result();
  if (y.numel() == 0) return y;
  LowRankProblem p = call.problem(y, 1.0);
  if (many) {
    p.padded_rank = static_cast<int>(round_up(p.rank, 16));
    x.scalar_type() == ScalarType::BFloat16 ? start_many_rows<bf16>(p, x) : start_many_rows<fp16>(p, x);
    return y;
  }
  call.start([&]<class T, class S>() { start_lowrank<T, S>(lowrank_linear_fwd_kernel<T, S>, p, x); });
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("lowrank_linear.native", TORCH_BOX(&burnish::lowrank_linear));
}
