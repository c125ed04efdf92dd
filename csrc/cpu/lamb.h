// The pass over memory that sums squares, for LAMB's ops on the CPU.
#pragma once

#include <vector>

#include "cpu/optimizer_step.h"
#include "math/lamb.h"

namespace burnish {

// For each tensor the sum of the squares of its elements and of its update's, of those that its mask keeps. The sums
// are in double, by chunks of one size, so that they do not depend on the number of threads.
std::vector<double> sum_lamb_squares(const OptimizerStep& step, const std::vector<LambScalars>& scalars);

}  // namespace burnish
