// grad_norm on the CPU: see burnish/ops/grad_norm.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"

namespace burnish {
namespace {

constexpr const char* kOp = "grad_norm";
constexpr int64_t kChunk = 16384;  // elements summed together, whatever the number of threads

std::tuple<Tensor, Tensor> grad_norm(const Tensors& grads, const std::optional<Tensor>& grad_scale) {
  BURNISH_CHECK(!grads.empty(), kOp, ": grads is empty, expected at least one tensor");
  check_scalar(kOp, "grad_scale", grad_scale, grads.front());
  std::vector<TensorView> flat(grads.begin(), grads.end());
  std::vector<Tensor> copies;  // of those that are not contiguous
  std::vector<int64_t> starts(grads.size() + 1);
  for (size_t i = 0; i < grads.size(); ++i) {
    check_floating(kOp, {"grads", i}, grads[i], grads.front());
    if (!grads[i].is_contiguous()) flat[i] = copies.emplace_back(torch::stable::contiguous(grads[i]));
    starts[i + 1] = starts[i] + (grads[i].numel() + kChunk - 1) / kChunk;
  }
  std::vector<double> sums(static_cast<size_t>(starts.back()));
  const Kernels& level = kernels();
  for_blocks(starts, 1, [&](size_t i, int64_t begin, int64_t end) {
    const Format format = format_of(flat[i].scalar_type());
    const auto* data = static_cast<const char*>(flat[i].const_data_ptr());
    const int64_t count = flat[i].numel();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t from = chunk * kChunk;
      sums[static_cast<size_t>(starts[i] + chunk)] =
          level.sum_squares(data + from * size_of(format), format, std::min(kChunk, count - from));
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  Tensor found = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total) / scalar_value(grad_scale, 1));
  *found.mutable_data_ptr<float>() = std::isfinite(total) ? 0.0f : 1.0f;
  return {norm, found};
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) { m.impl("grad_norm", TORCH_BOX(&burnish::grad_norm)); }
