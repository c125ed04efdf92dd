// sgd_step on the CPU: see burnish/ops/sgd_step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"

namespace burnish {
namespace {

constexpr const char* kOp = "sgd_step";

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
  run_step({.op = kOp,
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
            .seed = seed},
           kernels().sgd_step, [=](double factor, double rate, double step) {
             return sgd_scalars(factor, rate, step, momentum, dampening, weight_decay, nesterov);
           });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("sgd_step", TORCH_BOX(&burnish::sgd_step));
  m.impl("sgd_step.kept", TORCH_BOX(&burnish::WithKept<&burnish::sgd_step>::call));
}
