// int8_linear and int8_linear_backward on the CPU: see burnish/ops/int8_linear.py. Checks, scratch memory and the split
// of work over threads are here; the arithmetic is in simd/.
//
// Results do not depend on the split: every output element is computed by one thread, in one order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/int8_linear.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"
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
constexpr int64_t kRowBlockBytes = int64_t{32} << 10;  // quantised rows that a thread works on at a time: in L2
constexpr int64_t kAddendPanels = 4;                   // panels that an addend is made for at a time: in L2

}  // namespace

void check_int8_operands(const char* op, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
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

namespace {

// The rows of x.
struct Input {
  const char* data;
  int64_t count;
  int64_t width;
  int64_t stride;  // bytes
  Format format;
};

// Where a product finds quantised rows: `count` of them, taken from `scratch`.
struct Quantised {
  int8_t* q;
  float* scale;
  int32_t* offset;

  // 64 bytes beyond a multiple of 64 keep the rows of a power-of-two K out of each other's cache sets.
  static int64_t stride(int64_t width) { return round_up(width, 64) + 64; }
  static int64_t bytes(int64_t count, int64_t width) {
    return Scratch::bytes<int8_t>(count * stride(width)) + 2 * Scratch::bytes<float>(count);
  }
  static Quantised take(Scratch& scratch, int64_t count, int64_t width) {
    return {scratch.take<int8_t>(count * stride(width)), scratch.take<float>(count), scratch.take<int32_t>(count)};
  }
  void bind(Int8Product& product) const {
    product.q = q;
    product.row_scale = scale;
    product.row_offset = offset;
  }
  // Quantise rows [begin, end) of x to the places from `to` on.
  void fill(const Kernels& level, const Input& x, int64_t begin, int64_t end, int64_t to) const {
    const int64_t padded = round_up(x.width, kDepth);
    for (int64_t row = begin; row < end; ++row, ++to) {
      offset[to] =
          level.quantize_row(x.data + row * x.stride, x.format, x.width, padded, q + to * stride(x.width), scale + to);
    }
  }
};

// Rows [0, rows) of the product, rows first_row + i of x and of the addend, and panels [begin, end).
void multiply(const Kernels& level, Int8Product product, int64_t first_row, int64_t rows, int64_t begin, int64_t end,
              const Addend* addend) {
  if (addend == nullptr) return level.int8_product(product, 0, rows, begin, end);
  static thread_local Scratch scratch;
  scratch.reserve(Block::bytes(rows, kAddendPanels * kPanel, Format::kFloat));
  const Block tile = Block::take(scratch, rows, kAddendPanels * kPanel, Format::kFloat);
  product.addend = tile.floats(0);
  product.addend_stride = tile.stride / 4;
  for (int64_t p = begin; p < end; p += kAddendPanels) {
    const int64_t last = std::min(p + kAddendPanels, end);
    const Range columns{p * kPanel, std::min(last * kPanel, product.channels)};
    (*addend)({first_row, first_row + rows}, columns, tile.sums(false));
    level.int8_product(product, 0, rows, p, last);
  }
  scratch.trim();
}

// Rows [begin, end), a block at a time: quantised into memory that stays in L2, then multiplied by the whole weight.
void multiply_rows(const Kernels& level, const Input& x, Int8Product product, int64_t begin, int64_t end,
                   const Addend* addend) {
  static thread_local Scratch scratch;
  const int64_t panels = (product.channels + kPanel - 1) / kPanel;
  const int64_t block = std::max<int64_t>(kRowBlockBytes / product.q_stride / 6 * 6, 6);
  const int64_t held = std::min(block, end - begin);
  scratch.reserve(Quantised::bytes(held, x.width));
  const Quantised quantised = Quantised::take(scratch, held, x.width);
  quantised.bind(product);
  char* y = static_cast<char*>(product.y);
  for (int64_t row = begin; row < end; row += block) {
    const int64_t last = std::min(row + block, end);
    quantised.fill(level, x, row, last, 0);
    product.y = y + row * product.channels * size_of(product.y_format);
    multiply(level, product, row, last - row, 0, panels, addend);
  }
}

// All rows quantised first, then each thread multiplies them by panels of its own.
void multiply_panels(const Kernels& level, const Input& x, const Int8Product& asked, Scratch& scratch,
                     const Addend* addend) {
  Int8Product product = asked;
  const Quantised quantised = Quantised::take(scratch, x.count, x.width);
  quantised.bind(product);
  if (x.count == 1) {
    quantised.fill(level, x, 0, 1, 0);
  } else {
    parallel_for(0, x.count, 1, [&](int64_t begin, int64_t end) { quantised.fill(level, x, begin, end, begin); });
  }
  parallel_for(0, (product.channels + kPanel - 1) / kPanel, 1,
               [&](int64_t begin, int64_t end) { multiply(level, product, 0, x.count, begin, end, addend); });
}

}  // namespace

void int8_forward(const Rows& rows, Format x_format, const Tensor& weight, const Tensor& scale,
                  const std::optional<Tensor>& bias, int64_t activation, void* y, Format y_format,
                  const Addend* addend) {
  if (rows.count == 0) return;
  static thread_local Scratch scratch;
  const int64_t N = scale.size(0);
  const int64_t weights = N * rows.width;
  const int64_t threads = num_threads();
  const bool serial = rows.count * weights <= kSerialProducts && weights <= kSerialWeights;
  const bool by_rows = serial || (weights <= kSharedWeights && rows.count >= 4 * threads);
  scratch.reserve(2 * Scratch::bytes<float>(N) + (by_rows ? 0 : Quantised::bytes(rows.count, rows.width)));
  Int8Product product{};
  product.q_stride = Quantised::stride(rows.width);
  product.weight = weight.const_data_ptr<uint8_t>();
  product.depth = round_up(rows.width, kDepth) / kDepth;
  product.channels = N;
  product.channel_scale = as_floats(scale, scratch.take<float>(N));
  product.bias = bias.has_value() ? as_floats(*bias, scratch.take<float>(N)) : nullptr;
  product.activation = static_cast<int>(activation);
  product.y = y;
  product.y_format = y_format;
  const Kernels& level = kernels();
  const Input x{static_cast<const char*>(rows.tensor.const_data_ptr()), rows.count, rows.width,
                rows.stride * size_of(x_format), x_format};
  if (serial) {
    multiply_rows(level, x, product, 0, x.count, addend);
  } else if (by_rows) {
    parallel_for(0, x.count, 1,
                 [&](int64_t begin, int64_t end) { multiply_rows(level, x, product, begin, end, addend); });
  } else {
    multiply_panels(level, x, product, scratch, addend);
  }
  scratch.trim();
}

namespace {

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t activation, const std::optional<ScalarType>& out_dtype) {
  constexpr const char* kOp = "int8_linear";
  check_floating(kOp, "x", x);
  BURNISH_CHECK(x.dim() >= 1, "int8_linear: x is a scalar, expected at least one dimension");
  check_int8_operands(kOp, weight, scale, bias, x.size(x.dim() - 1), activation);
  const ScalarType out = out_dtype.value_or(x.scalar_type());
  BURNISH_CHECK(is_floating(out), "int8_linear: out_dtype is ", dtype_name(out), ", expected fp32, bf16, fp16 or None");
  const Rows rows = as_rows(x);
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, scale.size(0)), out);
  int8_forward(rows, format_of(x.scalar_type()), weight, scale, bias, activation, y.mutable_data_ptr(), format_of(out));
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
  check_int8_operands(kOp, weight, scale, bias, K, activation);
  const int64_t N = scale.size(0);
  BURNISH_CHECK(dy.size(dy.dim() - 1) == N, "int8_linear_backward: dy has shape ", shape_text(dy), ", expected [..., ",
                N, "] as scale has");
  const Rows rows = as_rows(dy);
  const int64_t M = rows.count;
  const Kernels& level = kernels();
  const Format format = format_of(dy.scalar_type()), product = level.product_format(format);
  static thread_local Scratch scratch;
  scratch.reserve(2 * Scratch::bytes<float>(M * N) + Block::bytes(M, N, product) + Scratch::bytes<float>(N));
  const float* z = nullptr;
  if (activation != 0) {
    BURNISH_CHECK(x.has_value(),
                  "int8_linear_backward: x is None, expected the input that the activation's slope needs");
    check_floating(kOp, "x", *x);
    std::vector<int64_t> expected = sizes_with_last(dy, K);
    BURNISH_CHECK(std::equal(expected.begin(), expected.end(), x->sizes().begin(), x->sizes().end()),
                  "int8_linear_backward: x has shape ", shape_text(*x), ", expected dy's with K=", K, " last");
    auto* values = scratch.take<float>(M * N);
    int8_forward(as_rows(*x), format_of(x->scalar_type()), weight, scale, bias, 0, values, Format::kFloat);
    z = values;
  }
  auto* dz = scratch.take<float>(M * N);  // dy * act'(z)
  const auto* from = static_cast<const char*>(rows.tensor.const_data_ptr());
  parallel_for(0, M, std::max<int64_t>(1, 16384 / N), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* z_row = z == nullptr ? nullptr : z + row * N;
      const char* dy_row = from + row * rows.stride * size_of(format);
      level.slope_row(dy_row, format, z_row, static_cast<int>(activation), nullptr, N, dz + row * N);
    }
  });

  Tensor dbias = torch::stable::new_empty(dy, {bias_grad ? N : 0}, ScalarType::Float);
  if (bias_grad) {
    auto* sums = dbias.mutable_data_ptr<float>();
    const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(M, 1));
    parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { sum_rows(dz, M, N, begin, end, sums); });
  }

  Tensor dx = torch::stable::new_empty(dy, sizes_with_last(dy, K));
  const Block scaled = Block::take(scratch, M, N, product);
  scale_columns(level, {dz, N * 4, Format::kFloat}, M, as_floats(scale, scratch.take<float>(N)), N, scaled);
  const Int8Rows w(weight, N, K);
  add_products_parallel(level, {w.pull(scaled.matrix())}, M, K, all_of(dx.mutable_data_ptr(), M, K, format, nullptr));
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
