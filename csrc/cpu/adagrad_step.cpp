// adagrad_step on the CPU: see burnish/ops/adagrad_step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"

namespace burnish {
namespace {

constexpr const char* kOp = "adagrad_step";

void adagrad_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& state_sums,
                  const Tensors& scales, const Tensors& masters, const Tensors& emas, const Tensors& masks,
                  const Tensor& lr, double lr_decay, double weight_decay, double eps, bool maximize, double ema_decay,
                  double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  check_not_negative(kOp, "lr_decay", lr_decay);
  check_not_negative(kOp, "weight_decay", weight_decay);
  check_not_negative(kOp, "eps", eps);
  run_step({.op = kOp,
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
            .seed = seed},
           kernels().adagrad_step, [=](double factor, double rate, double step) {
             return adagrad_scalars(factor, rate, step, lr_decay, eps, weight_decay);
           });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("adagrad_step", TORCH_BOX(&burnish::adagrad_step));
  m.impl("adagrad_step.kept", TORCH_BOX(&burnish::WithKept<&burnish::adagrad_step>::call));
}
