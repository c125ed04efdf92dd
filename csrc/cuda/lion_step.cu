// lion_step in CUDA C++: the element of math/lion.h in the kernel of optimizer_step.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/optimizer_step.cuh"
#include "math/lion.h"

namespace burnish {
namespace {

constexpr const char* kOp = "lion_step";

struct LionNumbers {
  double beta1, beta2, weight_decay;

  BURNISH_HD LionScalars operator()(double factor, double lr, double, uint32_t) const {
    return lion_scalars(factor, lr, beta1, beta2, weight_decay);
  }
};

template <int kRun>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) lion_step_fwd_kernel(StepCall<LionNumbers> call) {
  step_chunk<LionElement, kRun>(call);
}

void lion_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
               const Tensors& scales, const Tensors& masters, const Tensors& emas, const Tensors& masks,
               const Tensor& lr, double beta1, double beta2, double weight_decay, bool maximize, double ema_decay,
               double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  check_fraction(kOp, "beta1", beta1);
  check_fraction(kOp, "beta2", beta2);
  check_not_negative(kOp, "weight_decay", weight_decay);
  const LionNumbers numbers{beta1, beta2, weight_decay};
  const StepArguments given{.op = kOp,
                            .params = params,
                            .grads = grads,
                            .steps = steps,
                            .moments = {{"exp_avgs", exp_avgs, true}},
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
  start_step(given, numbers, lion_step_fwd_kernel<4>, lion_step_fwd_kernel<8>);
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("lion_step.native", TORCH_BOX(&burnish::lion_step));
}
