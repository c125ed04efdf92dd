// lion_step on the CPU: see burnish/ops/lion_step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"

namespace burnish {
namespace {

constexpr const char* kOp = "lion_step";

void lion_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
               const Tensors& scales, const Tensors& masters, const Tensors& emas, const Tensors& masks,
               const Tensor& lr, double beta1, double beta2, double weight_decay, bool maximize, double ema_decay,
               double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  check_fraction(kOp, "beta1", beta1);
  check_fraction(kOp, "beta2", beta2);
  check_not_negative(kOp, "weight_decay", weight_decay);
  run_step({.op = kOp,
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
            .seed = seed},
           kernels().lion_step,
           [=](double factor, double rate, double) { return lion_scalars(factor, rate, beta1, beta2, weight_decay); });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("lion_step", TORCH_BOX(&burnish::lion_step));
  m.impl("lion_step.kept", TORCH_BOX(&burnish::WithKept<&burnish::lion_step>::call));
}
