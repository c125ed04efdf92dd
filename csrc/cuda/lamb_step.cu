// lamb_step in CUDA C++: the pass of lamb_squares.cu, and the element of math/lamb.h in the kernel of
// optimizer_step.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/lamb.cuh"
#include "cuda/optimizer_step.cuh"

namespace burnish {
namespace {

constexpr const char* kOp = "lamb_step";

template <int kRun>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) lamb_step_fwd_kernel(StepCall<LambRule> call) {
  step_chunk<LambElement, kRun>(call);
}

void lamb_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& scales, const Tensors& masters, const Tensors& emas,
               const Tensors& masks, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
               bool bias_correction, bool adapt, bool trust_clip, const std::optional<Tensor>& squares, bool maximize,
               double ema_decay, double max_grad_norm, const std::optional<Tensor>& grad_norm,
               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
               std::optional<int64_t> seed) {
  const LambNumbers numbers{beta1, beta2, eps, weight_decay, bias_correction};
  numbers.check(kOp);
  check_squares(kOp, squares, params);
  const StepArguments given{.op = kOp,
                            .params = params,
                            .grads = grads,
                            .steps = steps,
                            .moments = {{"exp_avgs", exp_avgs, true}, {"exp_avg_sqs", exp_avg_sqs, false}},
                            .scales = scales,
                            .masters = masters,
                            .emas = emas,
                            .masks = masks,
                            .lr = lr,
                            .maximize = maximize,
                            .ema_decay = ema_decay,
                            .max_grad_norm = max_grad_norm,
                            .grad_norm = grad_norm,
                            .grad_scale = grad_scale,
                            .found_inf = found_inf,
                            .seed = seed};
  with_step(given, LambRule{numbers, adapt, trust_clip, nullptr}, [&](StepLaunch<LambRule> step) {
    std::optional<Tensor> sums = squares;
    if (adapt && !sums.has_value()) {
      sums = torch::stable::new_empty(lr, {static_cast<int64_t>(params.size()), 2}, ScalarType::Double);
      sum_lamb_squares(step, lr, sums->mutable_data_ptr<double>());
    }
    if (sums.has_value()) step.call.numbers.squares = sums->const_data_ptr<double>();
    step.start(lamb_step_fwd_kernel<4>, lamb_step_fwd_kernel<8>, kStepShared);
  });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("lamb_step.native", TORCH_BOX(&burnish::lamb_step));
}
