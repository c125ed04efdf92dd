// LAMB in CUDA C++: what lamb_step and lamb_squares share.
#pragma once

#include "cuda/step_call.cuh"
#include "lamb_arguments.h"

namespace burnish {

// `squares` [tensors, 2] are on the device; null where nothing is to be adapted to them, or they are to be summed.
struct LambRule {
  LambNumbers numbers;
  bool adapt, trust_clip;
  const double* squares;

  __device__ LambScalars operator()(double factor, double lr, double step, uint32_t tensor) const {
    LambScalars scalars = numbers.scalars(factor, step);
    const bool known = squares != nullptr;
    const double of_parameter = known ? load(squares + 2 * tensor) : 0,
                 of_update = known ? load(squares + 2 * tensor + 1) : 0;
    scalars.step_size = lamb_step_size(lr, of_parameter, of_update, adapt, trust_clip);
    return scalars;
  }
};

// Launches the pass that sums squares, to `squares`; counts no step.
void sum_lamb_squares(const StepLaunch<LambRule>& step, const Tensor& like, double* squares);

}  // namespace burnish
