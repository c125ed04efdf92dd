// lowrank_linear and lowrank_linear_backward on the CPU: see burnish/ops/lowrank_linear.py.
#include <torch/csrc/stable/library.h>

#include "cpu/lowrank.h"

namespace burnish {
namespace {

Tensor lowrank_linear(const Tensor& x, const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias) {
  check_factors("lowrank_linear", x, A, B);
  check_bias("lowrank_linear", bias, B.size(0));
  return lowrank_forward(x, Factors(A, B), nullptr, bias);
}

Gradients lowrank_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& A, const Tensor& B, bool x_grad,
                                  bool factor_grad, bool bias_grad) {
  check_factors("lowrank_linear_backward", x, A, B);
  check_gradient("lowrank_linear_backward", dy, x, B.size(0));
  return lowrank_backward(dy, x, Factors(A, B), nullptr, {x_grad, factor_grad, bias_grad});
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("lowrank_linear", TORCH_BOX(&burnish::lowrank_linear));
  m.impl("lowrank_linear.inference", TORCH_BOX(&burnish::lowrank_linear));
  m.impl("lowrank_linear_backward", TORCH_BOX(&burnish::lowrank_linear_backward));
}
