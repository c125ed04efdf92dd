// lamb_squares on the CPU: see burnish/ops/lamb_squares.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/lamb.h"
#include "lamb_arguments.h"

namespace burnish {
namespace {

constexpr const char* kOp = "lamb_squares";

Tensor lamb_squares(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& scales, const Tensors& masters, const Tensors& emas,
                    const Tensors& masks, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                    bool bias_correction, bool maximize, double ema_decay, double max_grad_norm,
                    const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  const LambNumbers numbers{beta1, beta2, eps, weight_decay, bias_correction};
  numbers.check(kOp);
  const OptimizerStep step =
      prepare_step({.op = kOp,
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
                    .seed = seed});
  std::vector<LambScalars> scalars;
  for (const TensorView& count : steps) {
    scalars.push_back(numbers.scalars(step.factor, *static_cast<const float*>(count.const_data_ptr()) + 1));
  }
  Tensor squares = torch::stable::new_empty(lr, {static_cast<int64_t>(params.size()), 2}, ScalarType::Double);
  std::vector<double> sums(2 * params.size());
  if (!step.tensors.empty()) sums = sum_lamb_squares(step, scalars);
  std::copy(sums.begin(), sums.end(), squares.mutable_data_ptr<double>());
  return squares;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) { m.impl("lamb_squares", TORCH_BOX(&burnish::lamb_squares)); }
