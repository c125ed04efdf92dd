// What lamb_step and lamb_squares share: LAMB's numbers, and the pass over memory that sums squares.
#pragma once

#include <vector>

#include "cpu/optimizer_step.h"
#include "math/lamb.h"

namespace burnish {

struct LambNumbers {
  double beta1, beta2, eps, weight_decay;
  bool bias_correction;

  void check(const char* op) const;
  // Of the tensor's next step, but for its size.
  LambScalars scalars(double factor, double step) const;
};

// For each tensor the sum of the squares of its elements and of its update's, of those that its mask keeps. The sums
// are in double, by chunks of one size, so that they do not depend on the number of threads.
std::vector<double> sum_lamb_squares(const OptimizerStep& step, const std::vector<LambScalars>& scalars);

}  // namespace burnish
