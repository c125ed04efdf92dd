// rmsprop_step on the CPU: see burnish/ops/rmsprop_step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"

namespace burnish {
namespace {

constexpr const char* kOp = "rmsprop_step";

void rmsprop_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& square_avgs,
                  const Tensors& grad_avgs, const Tensors& momentum_buffers, const Tensors& scales,
                  const Tensors& masters, const Tensors& emas, const Tensors& masks, const Tensor& lr, double alpha,
                  double eps, double weight_decay, double momentum, bool maximize, double ema_decay,
                  double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  check_fraction(kOp, "alpha", alpha);
  check_not_negative(kOp, "eps", eps);
  check_not_negative(kOp, "weight_decay", weight_decay);
  check_not_negative(kOp, "momentum", momentum);
  const bool centered = !grad_avgs.empty(), buffered = !momentum_buffers.empty();
  check_needed(kOp, "momentum", momentum, "momentum_buffers", buffered || params.empty());
  BURNISH_CHECK(!centered || grad_avgs.front().scalar_type() != ScalarType::Char, kOp,
                ": grad_avgs[0] is int8, expected fp32 or bf16: codes lose the variance");
  run_step({.op = kOp,
            .params = params,
            .grads = grads,
            .steps = steps,
            .moments = {{"square_avgs", square_avgs, false},
                        {"grad_avgs", grad_avgs, true, true},
                        {"momentum_buffers", momentum_buffers, true, true}},
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
           kernels().rmsprop_step, [=](double factor, double rate, double) {
             return rmsprop_scalars(factor, rate, alpha, eps, weight_decay, momentum, centered, buffered);
           });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("rmsprop_step", TORCH_BOX(&burnish::rmsprop_step));
  m.impl("rmsprop_step.kept", TORCH_BOX(&burnish::WithKept<&burnish::rmsprop_step>::call));
}
