// What the optimizers' ops share: everything is checked before anything is written, then one loop runs over the
// elements of all tensors together. An op of one pass is its numbers, checked, and run_step with its scalars and
// kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/held_steps.h"
#include "cpu/kept_lists.h"
#include "cpu/parallel.h"
#include "math/optimizer.h"
#include "step_arguments.h"

namespace burnish {

// A scalar of the step; `fallback` where there is none. Of all NaN the plain one, as cpu/simd/pairs.h wants it.
inline double scalar_value(const std::optional<Tensor>& scalar, double fallback) {
  if (!scalar.has_value()) return fallback;
  const double value = scalar->scalar_type() == ScalarType::Double ? *scalar->const_data_ptr<double>()
                                                                   : *scalar->const_data_ptr<float>();
  return std::isnan(value) ? std::numeric_limits<double>::quiet_NaN() : value;
}

// A checked step with its numbers; without tensors where it is skipped.
struct OptimizerStep : CheckedStep {
  double factor, lr;            // of the gradients; the learning rate
  std::vector<int64_t> starts;  // tensor i has blocks [starts[i], starts[i + 1]) of all
  std::vector<float*> counts;   // of each tensor's steps
};

inline OptimizerStep prepare_step(const StepArguments& given) {
  OptimizerStep step{check_step(given), 0, scalar_value(given.lr, 0), {0}, {}};
  const double norm = scalar_value(given.grad_norm, 0);
  step.factor = gradient_factor(given.maximize, scalar_value(given.grad_scale, 1), given.max_grad_norm, norm);
  const bool found = scalar_value(given.found_inf, 0) != 0 || (given.found_inf.has_value() && !std::isfinite(norm));
  if (found) step.tensors.clear();
  if (!step.tensors.empty()) {
    step.counts.reserve(step.tensors.size());
    for (const TensorView& count : given.steps) step.counts.push_back(count.mutable_data_ptr<float>());
  }
  for (const OptimizerTensor& tensor : step.tensors) {
    step.starts.push_back(step.starts.back() + (tensor.count + kStateBlock - 1) / kStateBlock);
  }
  return step;
}

// Counts the step of each tensor; scalars(factor, lr, step) gives what it is to it.
template <class F>
auto count_steps(const OptimizerStep& step, const F& scalars) {
  std::vector<decltype(scalars(0.0, 0.0, 0.0))> found;
  found.reserve(step.counts.size());
  float last = 0;
  for (float* const count : step.counts) {
    *count += 1;
    found.push_back(!found.empty() && *count == last ? found.back() : scalars(step.factor, step.lr, *count));
    last = *count;
  }
  return found;
}

constexpr int64_t kBlocksPerTask = 64;  // 16384 elements: some microseconds

// f(item, begin, end) on shares of the blocks of all items together: item i has starts[i + 1] - starts[i] of them.
template <class F>
void for_blocks(const std::vector<int64_t>& starts, int64_t grain, const F& f) {
  balanced_for(0, starts.back(), grain, [&](int64_t begin, int64_t end) {
    auto next = std::upper_bound(starts.begin(), starts.end(), begin);  // past the item that holds `begin`
    while (begin < end) {
      const int64_t last = std::min(end, *next);
      const int64_t start = *(next - 1);
      f(static_cast<size_t>(next - 1 - starts.begin()), begin - start, last - start);
      begin = last;
      while (next != starts.end() && *next <= begin) ++next;
    }
  });
}

// `scalars` is kept with the step.
template <class F, class Kernel>
void run_step(const StepArguments& given, Kernel kernel, const F& scalars) {
  OptimizerStep prepared = prepare_step(given);
  if (prepared.tensors.empty()) return;
  do_step([step = std::move(prepared), kernel, scalars] {
    const auto own = count_steps(step, scalars);
    for_blocks(step.starts, kBlocksPerTask,
               [&](size_t i, int64_t begin, int64_t end) { kernel(step.tensors[i], own[i], step.rule, begin, end); });
  });
}

}  // namespace burnish
