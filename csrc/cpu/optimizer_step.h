// What the optimizers' ops share: everything is checked before anything is written, then one loop runs over the
// elements of all tensors together. An op of one pass is its numbers, checked, and run_step with its scalars and
// kernel.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/optimizer.h"
#include "cpu/parallel.h"
#include "math/optimizer.h"

namespace burnish {

using Tensors = std::vector<Tensor>;

inline std::string item_name(const char* list, size_t item) {
  return std::string(list) + "[" + std::to_string(item) + "]";
}

// A scalar of the step, as fp32 or fp64 tensors hold it; `fallback` where there is none.
double scalar_value(const char* op, const char* name, const std::optional<Tensor>& scalar, double fallback);

// Numbers of a step: in [0, 1); at least 0 and finite; finite.
void check_fraction(const char* op, const char* name, double value);
void check_not_negative(const char* op, const char* name, double value);
void check_finite(const char* op, const char* name, double value);

// A number that is not 0 needs another argument.
void check_needed(const char* op, const char* name, double value, const char* needed, bool there);

// One kind of moment: a tensor for each parameter, or none where it is optional.
struct MomentList {
  const char* name;
  const Tensors& tensors;
  bool is_signed;
  bool optional = false;
};

// What every optimizer's op is given, by the names of its schema.
struct StepArguments {
  const char* op;
  const Tensors &params, &grads, &steps;
  std::vector<MomentList> moments;
  const Tensors &scales, &masters, &emas, &masks;
  const Tensor& lr;
  bool maximize;
  double ema_decay, max_grad_norm;
  const std::optional<Tensor>&grad_norm, &grad_scale, &found_inf;
  const std::optional<int64_t>& seed;
};

// The same, checked, as kernels take it; without tensors where there is nothing to step.
struct OptimizerStep {
  double factor, lr;  // of the gradients; the learning rate
  OptimizerRule rule;
  std::vector<OptimizerTensor> tensors;
  std::vector<int64_t> starts;  // tensor i has blocks [starts[i], starts[i + 1]) of all
};

OptimizerStep prepare_step(const StepArguments& given);

// Counts the step of each tensor; scalars(factor, lr, step) gives what it is to it.
template <class F>
auto count_steps(const OptimizerStep& step, const Tensors& counts, const F& scalars) {
  std::vector<decltype(scalars(0.0, 0.0, 0.0))> found;
  found.reserve(counts.size());
  float last = 0;
  for (const Tensor& tensor : counts) {
    float& count = *tensor.mutable_data_ptr<float>();
    count += 1;
    found.push_back(!found.empty() && count == last ? found.back() : scalars(step.factor, step.lr, count));
    last = count;
  }
  return found;
}

constexpr int64_t kBlocksPerTask = 64;  // 16384 elements: some microseconds

// f(item, begin, end) on shares of the blocks of all items together: item i has starts[i + 1] - starts[i] of them.
template <class F>
void for_blocks(const std::vector<int64_t>& starts, int64_t grain, const F& f) {
  parallel_for(0, starts.back(), grain, [&](int64_t begin, int64_t end) {
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

template <class F, class Kernel>
void run_step(const StepArguments& given, Kernel kernel, const F& scalars) {
  const OptimizerStep step = prepare_step(given);
  if (step.tensors.empty()) return;
  const auto own = count_steps(step, given.steps, scalars);
  for_blocks(step.starts, kBlocksPerTask,
             [&](size_t i, int64_t begin, int64_t end) { kernel(step.tensors[i], own[i], step.rule, begin, end); });
}

}  // namespace burnish
