// int8_linear and int8_linear_backward on the CPU: see burnish/ops/int8_linear.py. Checks, scratch memory and the split
// of work over threads are here; the arithmetic is in simd/.
//
// Results do not depend on the split: every output element is computed by one thread, in one order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/arguments.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "math/activation.h"
#include "math/half.h"
#include "rows.h"

namespace burnish {
namespace {

constexpr int64_t kMaxDepth = 131072;
// Work below this runs on the calling thread: starting another costs about what 2 M multiply-adds or 128 KiB of weights
// take, some 5 us.
constexpr int64_t kSerialProducts = int64_t{2} << 20;
constexpr int64_t kSerialWeights = int64_t{128} << 10;
// A weight this small stays in a core's L2 beside its share of rows: threads then split the rows, quantise their own
// and need no barrier in between. A larger one is split by panels, so that each byte of it is read by one core.
constexpr int64_t kSharedWeights = int64_t{1} << 20;
constexpr int64_t kRowBlockBytes = int64_t{96} << 10;  // quantised rows that a thread works on at a time: in L2

void check_operands(const char* op, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                    int64_t K, int64_t activation) {
  check_cpu(op, "scale", scale);
  BURNISH_CHECK(scale.scalar_type() == ScalarType::Float, op, ": scale is ", dtype_name(scale.scalar_type()),
                ", expected fp32");
  BURNISH_CHECK(scale.dim() == 1 && scale.size(0) >= 1, op, ": scale has shape ", shape_text(scale),
                ", expected [N] with N >= 1");
  const int64_t N = scale.size(0);
  BURNISH_CHECK(K >= 0 && K <= kMaxDepth, op, ": K is ", K, ", expected at most ", kMaxDepth,
                ": int32 sums could overflow");
  check_packed(op, "weight", weight, N, K, true);
  if (bias.has_value()) {
    check_floating(op, "bias", *bias);
    BURNISH_CHECK(bias->dim() == 1 && bias->size(0) == N, op, ": bias has shape ", shape_text(*bias), ", expected [", N,
                  "] as scale has");
  }
  BURNISH_CHECK(activation >= 0 && activation < kActivations, op, ": activation is ", activation, ", expected 0 to ",
                kActivations - 1);
}

// An fp32 contiguous view of a vector: itself, or a copy in `storage`.
const float* as_floats(const Tensor& vector, float* storage) {
  const Format format = format_of(vector.scalar_type());
  const int64_t count = vector.size(0), stride = count > 1 ? vector.stride(0) : 1;
  const void* data = vector.const_data_ptr();
  if (stride == 1 && format == Format::kFloat) return static_cast<const float*>(data);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * stride;
    storage[i] = format == Format::kBf16   ? to_float(static_cast<const bf16*>(data)[at])
                 : format == Format::kFp16 ? to_float(static_cast<const fp16*>(data)[at])
                                           : static_cast<const float*>(data)[at];
  }
  return storage;
}

struct Forward {
  const Kernels& level;
  Int8Product product;
  const char* x;
  int64_t x_stride;  // bytes
  Format x_format;
  int64_t width;
  int8_t* q;
  float* row_scale;
  int32_t* row_offset;

  void quantize(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      row_offset[row] = level.quantize_row(x + row * x_stride, x_format, width, product.depth * kDepth,
                                           q + row * product.q_stride, row_scale + row);
    }
  }
};

void run_forward(const Forward& f, int64_t rows) {
  const int64_t panels = (f.product.channels + kPanel - 1) / kPanel;
  const int64_t weights = f.product.channels * f.width;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || (rows * weights <= kSerialProducts && weights <= kSerialWeights)) {
    f.quantize(0, rows);
    f.level.int8_product(f.product, 0, rows, 0, panels);
    return;
  }
  if (weights <= kSharedWeights && rows >= 4 * threads) {
    const int64_t block = std::max<int64_t>(kRowBlockBytes / f.product.q_stride / 6 * 6, 6);
    torch::stable::parallel_for(0, rows, (rows + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += block) {
        const int64_t last = std::min(row + block, end);
        f.quantize(row, last);
        f.level.int8_product(f.product, row, last, 0, panels);
      }
    });
    return;
  }
  if (rows == 1) {
    f.quantize(0, 1);
  } else {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { f.quantize(begin, end); });
  }
  torch::stable::parallel_for(
      0, panels, 1, [&](int64_t begin, int64_t end) { f.level.int8_product(f.product, 0, rows, begin, end); });
}

// y must hold [rows, N] elements of y_format.
void forward(const Rows& rows, Format x_format, const Tensor& weight, const Tensor& scale,
             const std::optional<Tensor>& bias, int64_t activation, void* y, Format y_format) {
  if (rows.count == 0) return;
  static thread_local Scratch scratch;
  const int64_t N = scale.size(0);
  // 64 bytes beyond a multiple of 64 keep the rows of a power-of-two K out of each other's cache sets
  const int64_t q_stride = round_up(rows.width, 64) + 64;
  scratch.reserve(Scratch::bytes<int8_t>(rows.count * q_stride) + 2 * Scratch::bytes<float>(rows.count) +
                  2 * Scratch::bytes<float>(N));
  auto* q = scratch.take<int8_t>(rows.count * q_stride);
  auto* row_scale = scratch.take<float>(rows.count);
  auto* row_offset = scratch.take<int32_t>(rows.count);
  const float* channel_scale = as_floats(scale, scratch.take<float>(N));
  const float* offset = bias.has_value() ? as_floats(*bias, scratch.take<float>(N)) : nullptr;
  const Int8Product product{q,
                            q_stride,
                            row_scale,
                            row_offset,
                            weight.const_data_ptr<uint8_t>(),
                            round_up(rows.width, kDepth) / kDepth,
                            N,
                            channel_scale,
                            offset,
                            static_cast<int>(activation),
                            y,
                            y_format};
  run_forward({kernels(), product, static_cast<const char*>(rows.tensor.const_data_ptr()),
               rows.stride * size_of(x_format), x_format, rows.width, q, row_scale, row_offset},
              rows.count);
  scratch.trim();
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t activation, const std::optional<ScalarType>& out_dtype) {
  constexpr const char* kOp = "int8_linear";
  check_floating(kOp, "x", x);
  BURNISH_CHECK(x.dim() >= 1, "int8_linear: x is a scalar, expected at least one dimension");
  check_operands(kOp, weight, scale, bias, x.size(x.dim() - 1), activation);
  const ScalarType out = out_dtype.value_or(x.scalar_type());
  BURNISH_CHECK(is_floating(out), "int8_linear: out_dtype is ", dtype_name(out), ", expected fp32, bf16, fp16 or None");
  const Rows rows = as_rows(x);
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, scale.size(0)), out);
  forward(rows, format_of(x.scalar_type()), weight, scale, bias, activation, y.mutable_data_ptr(), format_of(out));
  return y;
}

// sums[n] = the sum of column n of dz, n in [begin, end): blocks of rows apart, then the blocks, which keeps the
// rounding error of a long sum near that of a short one.
void sum_rows(const float* dz, int64_t rows, int64_t stride, int64_t begin, int64_t end, float* sums) {
  constexpr int64_t kBlock = 16;
  float block[kPanel];
  std::fill(sums + begin, sums + end, 0.0f);
  for (int64_t from = begin; from < end; from += kPanel) {
    const int64_t count = std::min(kPanel, end - from);
    for (int64_t row = 0; row < rows; row += kBlock) {
      std::fill(block, block + count, 0.0f);
      for (int64_t r = row; r < std::min(row + kBlock, rows); ++r) {
        for (int64_t n = 0; n < count; ++n) block[n] += dz[r * stride + from + n];
      }
      for (int64_t n = 0; n < count; ++n) sums[from + n] += block[n];
    }
  }
}

// dx and dbias for dz = dy * act'(z), z recomputed by the forward where there is an activation.
std::tuple<Tensor, Tensor> int8_linear_backward(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight,
                                                const Tensor& scale, const std::optional<Tensor>& bias, int64_t K,
                                                int64_t activation, bool bias_grad) {
  constexpr const char* kOp = "int8_linear_backward";
  check_floating(kOp, "dy", dy);
  BURNISH_CHECK(dy.dim() >= 1, "int8_linear_backward: dy is a scalar, expected at least one dimension");
  check_operands(kOp, weight, scale, bias, K, activation);
  const int64_t N = scale.size(0);
  BURNISH_CHECK(dy.size(dy.dim() - 1) == N, "int8_linear_backward: dy has shape ", shape_text(dy), ", expected [..., ",
                N, "] as scale has");
  const Rows rows = as_rows(dy);
  const int64_t M = rows.count, padded = round_up(N, kGroup);
  static thread_local Scratch scratch;
  scratch.reserve(Scratch::bytes<float>(M * N) + 2 * Scratch::bytes<float>(M * padded) + Scratch::bytes<float>(N));
  const float* z = nullptr;
  if (activation != 0) {
    BURNISH_CHECK(x.has_value(),
                  "int8_linear_backward: x is None, expected the input that the activation's slope needs");
    check_floating(kOp, "x", *x);
    std::vector<int64_t> expected = sizes_with_last(dy, K);
    BURNISH_CHECK(std::equal(expected.begin(), expected.end(), x->sizes().begin(), x->sizes().end()),
                  "int8_linear_backward: x has shape ", shape_text(*x), ", expected dy's with K=", K, " last");
    auto* values = scratch.take<float>(M * N);
    forward(as_rows(*x), format_of(x->scalar_type()), weight, scale, bias, 0, values, Format::kFloat);
    z = values;
  }
  auto* dz = scratch.take<float>(M * padded);  // dy * act'(z), for dbias
  auto* scaled = scratch.take<float>(M * padded);
  const float* channel_scale = as_floats(scale, scratch.take<float>(N));
  const Kernels& level = kernels();
  const Format format = format_of(dy.scalar_type());
  const auto* from = static_cast<const char*>(rows.tensor.const_data_ptr());
  torch::stable::parallel_for(0, M, std::max<int64_t>(1, 16384 / N), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* z_row = z == nullptr ? nullptr : z + row * N;
      const char* dy_row = from + row * rows.stride * size_of(format);
      level.slope_row(dy_row, format, z_row, static_cast<int>(activation), nullptr, N, dz + row * padded);
      level.slope_row(dz + row * padded, Format::kFloat, nullptr, 0, channel_scale, N, scaled + row * padded);
      std::fill(scaled + row * padded + N, scaled + (row + 1) * padded, 0.0f);
    }
  });

  Tensor dbias = torch::stable::new_empty(dy, {bias_grad ? N : 0}, ScalarType::Float);
  if (bias_grad) {
    auto* sums = dbias.mutable_data_ptr<float>();
    const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(M, 1));
    torch::stable::parallel_for(0, N, grain,
                                [&](int64_t begin, int64_t end) { sum_rows(dz, M, padded, begin, end, sums); });
  }

  Tensor dx = torch::stable::new_empty(dy, sizes_with_last(dy, K));
  const Int8Dx args{scaled, padded, M, weight.const_data_ptr<uint8_t>(), N, K, dx.mutable_data_ptr(), format};
  const int64_t blocks = M == 0 ? 0 : (K + kPanel - 1) / kPanel;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch partial;
    partial.reserve(Scratch::bytes<float>(int8_dx_scratch(M)));
    level.int8_dx(args, begin, end, partial.take<float>(int8_dx_scratch(M)));
  });
  scratch.trim();
  return {dx, dbias};
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&burnish::int8_linear));
  m.impl("int8_linear.inference", TORCH_BOX(&burnish::int8_linear));
  m.impl("int8_linear_backward", TORCH_BOX(&burnish::int8_linear_backward));
}
