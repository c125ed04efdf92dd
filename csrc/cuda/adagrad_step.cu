// adagrad_step in CUDA C++: the element of math/adagrad.h in the kernel of optimizer_step.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/optimizer_step.cuh"
#include "math/adagrad.h"

namespace burnish {
namespace {

constexpr const char* kOp = "adagrad_step";

struct AdagradNumbers {
  double lr_decay, weight_decay, eps;

  BURNISH_HD AdagradScalars operator()(double factor, double lr, double step, uint32_t) const {
    return adagrad_scalars(factor, lr, step, lr_decay, eps, weight_decay);
  }
};

template <class Element, int kRun>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) adagrad_step_fwd_kernel(StepCall<AdagradNumbers> call) {
  step_chunk<Element, kRun>(call);
}

void adagrad_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& state_sums,
                  const Tensors& scales, const Tensors& masters, const Tensors& emas, const Tensors& masks,
                  const Tensor& lr, double lr_decay, double weight_decay, double eps, bool maximize, double ema_decay,
                  double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  check_not_negative(kOp, "lr_decay", lr_decay);
  check_not_negative(kOp, "weight_decay", weight_decay);
  check_not_negative(kOp, "eps", eps);
  const AdagradNumbers numbers{lr_decay, weight_decay, eps};
  const StepArguments given{.op = kOp,
                            .params = params,
                            .grads = grads,
                            .steps = steps,
                            .moments = {{"state_sums", state_sums, false}},
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
  with_adagrad_element(weight_decay != 0, [&]<class Element>(Element) {
    start_step(given, numbers, adagrad_step_fwd_kernel<Element, 4>, adagrad_step_fwd_kernel<Element, 8>);
  });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("adagrad_step.native", TORCH_BOX(&burnish::adagrad_step));
}
