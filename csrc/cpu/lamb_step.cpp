// lamb_step on the CPU: see burnish/ops/lamb_step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/lamb.h"
#include "lamb_arguments.h"

namespace burnish {
namespace {

constexpr const char* kOp = "lamb_step";

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
  OptimizerStep prepared = prepare_step({.op = kOp,
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
  if (prepared.tensors.empty()) return;
  std::vector<double> given(squares.has_value() ? 2 * params.size() : 0);
  if (squares.has_value()) std::copy_n(squares->const_data_ptr<double>(), given.size(), given.begin());
  do_step([=, step = std::move(prepared), given = std::move(given)] {
    std::vector<LambScalars> scalars =
        count_steps(step, [&](double factor, double, double count) { return numbers.scalars(factor, count); });
    std::vector<double> sums = given;
    if (sums.empty()) sums = adapt ? sum_lamb_squares(step, scalars) : std::vector<double>(2 * scalars.size());
    for (size_t i = 0; i < scalars.size(); ++i) {
      scalars[i].step_size = lamb_step_size(step.lr, sums[2 * i], sums[2 * i + 1], adapt, trust_clip);
    }
    const Kernels& level = kernels();
    for_blocks(step.starts, kBlocksPerTask, [&](size_t i, int64_t begin, int64_t end) {
      level.lamb_step(step.tensors[i], scalars[i], step.rule, begin, end);
    });
  });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("lamb_step", TORCH_BOX(&burnish::lamb_step));
  m.impl("lamb_step.kept", TORCH_BOX(&burnish::WithKept<&burnish::lamb_step>::call));
}
