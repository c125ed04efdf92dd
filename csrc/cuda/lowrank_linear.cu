// lowrank_linear in CUDA C++ for at most 64 rows of x: the kernel of lowrank.cuh without a base.
#include <torch/csrc/stable/library.h>

#include "cuda/lowrank_host.cuh"

namespace burnish {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2) lowrank_linear_fwd_kernel(LowRankProblem p) {
  lowrank_forward<T, NoBase, S>(p);
}

Tensor lowrank_linear(const Tensor& x, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias) {
  const LowRankCall call("lowrank_linear", x, A, B, bias);
  call.expect_few_rows("lowrank_linear");
  const DeviceGuard guard(x.get_device_index());
  Tensor y = call.new_result();
  if (y.numel() == 0) return y;
  LowRankProblem p = call.problem(y, 1.0);
  call.start([&]<class T, class S>() { start_lowrank<T, S>(lowrank_linear_fwd_kernel<T, S>, p, x); });
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("lowrank_linear.native", TORCH_BOX(&burnish::lowrank_linear));
}
