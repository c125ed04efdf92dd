// What LAMB's ops share on every device: their numbers, and the sums of squares that they may be given.
#pragma once

#include "math/lamb.h"
#include "step_arguments.h"

namespace burnish {

struct LambNumbers {
  double beta1, beta2, eps, weight_decay;
  bool bias_correction;

  void check(const char* op) const {
    check_fraction(op, "beta1", beta1);
    check_fraction(op, "beta2", beta2);
    check_not_negative(op, "eps", eps);
    check_not_negative(op, "weight_decay", weight_decay);
  }

  // Of a tensor's step, but for its size.
  BURNISH_HD LambScalars scalars(double factor, double step) const {
    return lamb_scalars(factor, step, beta1, beta2, eps, weight_decay, bias_correction);
  }
};

inline void check_squares(const char* op, const std::optional<Tensor>& squares, const Tensors& params) {
  if (!squares.has_value()) return;
  if (!params.empty()) check_device(op, {"squares"}, *squares, params.front());
  BURNISH_CHECK(squares->scalar_type() == ScalarType::Double && squares->is_contiguous(), op, ": squares is ",
                dtype_name(squares->scalar_type()), ", expected fp64, contiguous");
  BURNISH_CHECK(squares->dim() == 2 && squares->size(0) == static_cast<int64_t>(params.size()) && squares->size(1) == 2,
                op, ": squares has shape ", shape_text(*squares), ", expected (", params.size(), ", 2)");
}

}  // namespace burnish
