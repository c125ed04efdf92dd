// sgd_step in CUDA C++: the element of math/sgd.h in the kernel of optimizer_step.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/optimizer_step.cuh"
#include "math/sgd.h"

namespace burnish {
namespace {

constexpr const char* kOp = "sgd_step";

struct SgdNumbers {
  double momentum, dampening, weight_decay;
  bool nesterov;

  BURNISH_HD SgdScalars operator()(double factor, double lr, double step, uint32_t) const {
    return sgd_scalars(factor, lr, step, momentum, dampening, weight_decay, nesterov);
  }
};

template <class Element, int kRun>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) sgd_step_fwd_kernel(StepCall<SgdNumbers> call) {
  step_chunk<Element, kRun>(call);
}

void sgd_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& momentum_buffers,
              const Tensors& scales, const Tensors& masters, const Tensors& emas, const Tensors& masks,
              const Tensor& lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
              double ema_decay, double max_grad_norm, const std::optional<Tensor>& grad_norm,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              std::optional<int64_t> seed) {
  check_not_negative(kOp, "momentum", momentum);
  check_finite(kOp, "dampening", dampening);
  check_not_negative(kOp, "weight_decay", weight_decay);
  check_needed(kOp, "momentum", momentum, "momentum_buffers", !momentum_buffers.empty() || params.empty());
  const SgdNumbers numbers{momentum, dampening, weight_decay, nesterov};
  const StepArguments given{.op = kOp,
                            .params = params,
                            .grads = grads,
                            .steps = steps,
                            .moments = {{"momentum_buffers", momentum_buffers, true, true}},
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
  with_sgd_element(weight_decay != 0, !momentum_buffers.empty(), nesterov, [&]<class Element>(Element) {
    start_step(given, numbers, sgd_step_fwd_kernel<Element, 4>, sgd_step_fwd_kernel<Element, 8>);
  });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) { m.impl("sgd_step.native", TORCH_BOX(&burnish::sgd_step)); }
