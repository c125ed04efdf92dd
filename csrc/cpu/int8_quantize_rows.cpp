// int8_quantize_rows on the CPU: see burnish/ops/int8_quantize_rows.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cpu/arguments.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "rows.h"

namespace burnish {
namespace {

constexpr int64_t kElementsPerTask = 32768;  // some microseconds: what a second thread must be worth

std::tuple<Tensor, Tensor> int8_quantize_rows(const Tensor& x) {
  check_floating("int8_quantize_rows", "x", x);
  BURNISH_CHECK(x.dim() >= 1, "int8_quantize_rows: x is a scalar, expected [..., K]");
  const Kernels& level = kernels();
  const Rows rows = as_rows(x);
  Tensor q = torch::stable::new_empty(x, sizes_with_last(x, rows.width), ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, sizes_with_last(x, -1), ScalarType::Float);
  const Format format = format_of(x.scalar_type());
  const auto* from = static_cast<const char*>(rows.tensor.const_data_ptr());
  auto* to = q.mutable_data_ptr<int8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  const int64_t row_bytes = rows.stride * size_of(format);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, rows.width));
  parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      level.quantize_row(from + row * row_bytes, format, rows.width, rows.width, to + row * rows.width, scales + row);
    }
  });
  return {q, scale};
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) { m.impl("int8_quantize_rows", TORCH_BOX(&burnish::int8_quantize_rows)); }
