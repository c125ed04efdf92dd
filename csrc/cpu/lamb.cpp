#include "cpu/lamb.h"

#include "cpu/isa.h"

namespace burnish {

std::vector<double> sum_lamb_squares(const OptimizerStep& step, const std::vector<LambScalars>& scalars) {
  const size_t count = step.tensors.size();
  std::vector<int64_t> starts(count + 1);  // of each tensor's chunks
  for (size_t i = 0; i < count; ++i) {
    starts[i + 1] = starts[i] + (step.starts[i + 1] - step.starts[i] + kBlocksPerTask - 1) / kBlocksPerTask;
  }
  std::vector<double> parts(2 * static_cast<size_t>(starts.back())), squares(2 * count);
  const Kernels& level = kernels();
  for_blocks(starts, 1, [&](size_t i, int64_t begin, int64_t end) {
    const int64_t blocks = step.starts[i + 1] - step.starts[i];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t from = chunk * kBlocksPerTask, to = std::min(blocks, from + kBlocksPerTask);
      double* const sums = parts.data() + 2 * (starts[i] + chunk);
      level.lamb_squares(step.tensors[i], scalars[i], step.rule, from, to, sums);
    }
  });
  for (size_t i = 0; i < count; ++i) {
    for (auto part = static_cast<size_t>(2 * starts[i]); part < static_cast<size_t>(2 * starts[i + 1]); part += 2) {
      squares[2 * i] += parts[part];
      squares[2 * i + 1] += parts[part + 1];
    }
  }
  return squares;
}

}  // namespace burnish
