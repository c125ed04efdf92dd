// adam_step in CUDA C++: the element of math/adam.h in the kernel of optimizer_step.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/optimizer_step.cuh"
#include "math/adam.h"

namespace burnish {
namespace {

constexpr const char* kOp = "adam_step";

struct AdamNumbers {
  double beta1, beta2, eps, weight_decay;
  bool decoupled;

  BURNISH_HD AdamScalars operator()(double factor, double lr, double step, uint32_t) const {
    return adam_scalars(factor, lr, step, beta1, beta2, eps, weight_decay, decoupled);
  }
};

template <class Element, int kRun>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) adam_step_fwd_kernel(StepCall<AdamNumbers> call) {
  step_chunk<Element, kRun>(call);
}

void adam_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& scales,
               const Tensors& masters, const Tensors& emas, const Tensors& masks, const Tensor& lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, bool maximize, double ema_decay,
               double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  check_fraction(kOp, "beta1", beta1);
  check_fraction(kOp, "beta2", beta2);
  check_not_negative(kOp, "eps", eps);
  check_not_negative(kOp, "weight_decay", weight_decay);
  const AdamNumbers numbers{beta1, beta2, eps, weight_decay, decoupled};
  const StepArguments given{.op = kOp,
                            .params = params,
                            .grads = grads,
                            .steps = steps,
                            .moments = {{"exp_avgs", exp_avgs, true},
                                        {"exp_avg_sqs", exp_avg_sqs, false},
                                        {"max_exp_avg_sqs", max_exp_avg_sqs, false, true}},
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
  with_adam_element(!decoupled && weight_decay != 0, !max_exp_avg_sqs.empty(), [&]<class Element>(Element) {
    start_step(given, numbers, adam_step_fwd_kernel<Element, 4>, adam_step_fwd_kernel<Element, 8>);
  });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("adam_step.native", TORCH_BOX(&burnish::adam_step));
}
