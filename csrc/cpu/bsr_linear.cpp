// bsr_linear and bsr_linear_backward on the CPU: see burnish/ops/bsr_linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/isa.h"
#include "cpu/lowrank.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "rows.h"

namespace burnish {
namespace {

constexpr int64_t kMaxDepth = 131072;  // of int8 values: int32 sums hold it
constexpr int64_t kBlocks[][2] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {1, 16}, {4, 16}};

int64_t blocks_along(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The weight's tensors, checked: shapes, and that every index is in range.
struct Blocks {
  const Tensor& values;
  int64_t N, K, count, bn, bk, down, across;
  const int32_t *crow, *col;             // by rows of blocks
  const int32_t *ccol, *row, *position;  // by columns of blocks
  bool int8;
};

const int32_t* check_vector(const char* op, const char* name, const Tensor& tensor, int64_t length, const Blocks& w) {
  check_cpu(op, name, tensor);
  BURNISH_CHECK(tensor.scalar_type() == ScalarType::Int, op, ": ", name, " is ", dtype_name(tensor.scalar_type()),
                ", expected int32");
  BURNISH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, op, ": ", name, " has shape ", shape_text(tensor),
                ", expected [", length, "] for N=", w.N, ", K=", w.K, ", ", w.count, " blocks of ", w.bn, "x", w.bk);
  BURNISH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
  return tensor.const_data_ptr<int32_t>();
}

// Raises unless `starts` runs from 0 to `count`, never backwards.
void check_starts(const char* op, const char* name, const int32_t* starts, int64_t length, int64_t count) {
  bool ordered = starts[0] == 0 && starts[length] == count;
  for (int64_t i = 0; i < length; ++i) ordered &= starts[i] <= starts[i + 1];
  BURNISH_CHECK(ordered, op, ": ", name, " does not run from 0 to ", count, " without falling");
}

void check_range(const char* op, const char* name, const int32_t* places, int64_t count, int64_t limit) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= places[i] >= 0 && places[i] < limit;
  BURNISH_CHECK(inside, op, ": ", name, " has an index out of range, expected 0 to ", limit - 1);
}

Blocks check_weight(const char* op, const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                    const Tensor& transposed, const std::optional<Tensor>& scale, int64_t N, bool backward) {
  check_floating(op, "x", x);
  BURNISH_CHECK(x.dim() >= 1, op, ": x is a scalar, expected at least one dimension");
  check_cpu(op, "values", values);
  const bool int8 = scale.has_value();
  const ScalarType type = int8 ? ScalarType::Char : x.scalar_type();
  BURNISH_CHECK(values.scalar_type() == type, op, ": values is ", dtype_name(values.scalar_type()), ", expected ",
                dtype_name(type), int8 ? " as there is a scale" : " as x is, or int8 with a scale");
  bool known = false;
  for (const auto& block : kBlocks) {
    known = known || (values.dim() == 3 && values.size(1) == block[0] && values.size(2) == block[1]);
  }
  BURNISH_CHECK(known, op, ": values has shape ", shape_text(values),
                ", expected [nnzb, bn, bk] with blocks of 16x16, 32x32, 64x64, 128x128, 1x16, 4x16");
  BURNISH_CHECK(values.is_contiguous(), op, ": values is not contiguous");
  const int64_t K = x.size(x.dim() - 1), count = values.size(0), bn = values.size(1), bk = values.size(2);
  BURNISH_CHECK(N >= 1, op, ": N is ", N, ", expected at least 1");
  BURNISH_CHECK(!int8 || K <= kMaxDepth, op, ": K is ", K, ", expected at most ", kMaxDepth, " with int8 values");
  Blocks made{values,  N,       K,       count,   bn,      bk,  blocks_along(N, bn), blocks_along(K, bk),
              nullptr, nullptr, nullptr, nullptr, nullptr, int8};
  made.crow = check_vector(op, "crow_indices", crow, made.down + 1, made);
  made.col = check_vector(op, "col_indices", col, count, made);
  made.ccol = check_vector(op, "transposed", transposed, made.across + 1 + 2 * count, made);
  made.row = made.ccol + made.across + 1;
  made.position = made.row + count;
  check_starts(op, "crow_indices", made.crow, made.down, count);
  check_range(op, "col_indices", made.col, count, made.across);
  if (backward) {
    check_starts(op, "transposed", made.ccol, made.across, count);
    check_range(op, "transposed", made.row, count, made.down);
    check_range(op, "transposed", made.position, count, count);
  }
  if (int8) {
    check_cpu(op, "scale", *scale);
    BURNISH_CHECK(scale->scalar_type() == ScalarType::Float, op, ": scale is ", dtype_name(scale->scalar_type()),
                  ", expected fp32");
    BURNISH_CHECK(scale->dim() == 1 && scale->size(0) == N, op, ": scale has shape ", shape_text(*scale),
                  ", expected [", N, "]");
  }
  return made;
}

float element(const void* data, Format format, int64_t at) {
  return format == Format::kBf16   ? to_float(static_cast<const bf16*>(data)[at])
         : format == Format::kFp16 ? to_float(static_cast<const fp16*>(data)[at])
                                   : static_cast<const float*>(data)[at];
}

float weight_at(const Blocks& w, Format format, int64_t at) {
  return w.int8 ? static_cast<float>(w.values.const_data_ptr<int8_t>()[at])
                : element(w.values.const_data_ptr(), format, at);
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                  const Tensor& transposed, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                  int64_t N) {
  constexpr const char* kOp = "bsr_linear";
  const Blocks w = check_weight(kOp, x, values, crow, col, transposed, scale, N, false);
  check_bias(kOp, bias, N);
  const Operand from(x);
  const Kernels& level = kernels();
  const int64_t M = from.rows.count, K = w.K;
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, N));
  std::vector<float> offset(static_cast<size_t>(N)), factor(static_cast<size_t>(N));
  const float* biases = bias.has_value() ? as_floats(*bias, offset.data()) : nullptr;
  const float* scales = scale.has_value() ? as_floats(*scale, factor.data()) : nullptr;
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const Format format = from.matrix.format;
  parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(N));
    std::vector<int8_t> q(static_cast<size_t>(K) + 1);
    for (int64_t m = begin; m < end; ++m) {
      const void* row = from.matrix.at(m, 0).data;
      float row_scale = 0.0f;
      if (w.int8) level.quantize_row(row, format, K, K, q.data(), &row_scale);
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0.0;
        for (int64_t b = w.crow[n / w.bn]; b < w.crow[n / w.bn + 1]; ++b) {
          for (int64_t j = 0; j < w.bk; ++j) {
            const int64_t k = w.col[b] * w.bk + j;
            const double left = k >= K   ? 0.0
                                : w.int8 ? q[static_cast<size_t>(k)]
                                         : static_cast<double>(element(row, format, k));
            sum += left * static_cast<double>(weight_at(w, format, (b * w.bn + n % w.bn) * w.bk + j));
          }
        }
        float value = static_cast<float>(sum);
        if (w.int8) value *= row_scale * scales[n];
        if (biases != nullptr) value += biases[n];
        sums[static_cast<size_t>(n)] = value;
      }
      level.convert(sums.data(), 1.0f, N, out + m * N * size_of(format), format);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bsr_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                       const Tensor& crow, const Tensor& col, const Tensor& transposed,
                                                       const std::optional<Tensor>& scale, bool x_grad,
                                                       bool values_grad, bool bias_grad) {
  constexpr const char* kOp = "bsr_linear_backward";
  check_floating(kOp, "dy", dy);
  BURNISH_CHECK(dy.dim() >= 1, kOp, ": dy is a scalar, expected at least one dimension");
  const int64_t N = dy.size(dy.dim() - 1);
  const Blocks w = check_weight(kOp, x, values, crow, col, transposed, scale, N, true);
  check_gradient(kOp, dy, x, N);
  BURNISH_CHECK(!w.int8 || !values_grad, kOp, ": values_grad is True, expected False: int8 values are frozen");
  const Operand from(x), pulled(dy);
  const Kernels& level = kernels();
  const Format format = from.matrix.format;
  const int64_t M = from.rows.count, K = w.K, size = w.bn * w.bk;
  Tensor dx = torch::stable::new_empty(x, x_grad ? sizes_with_last(x, K) : std::vector<int64_t>{0});
  Tensor dvalues =
      torch::stable::new_empty(x, values_grad ? std::vector<int64_t>{w.count, w.bn, w.bk} : std::vector<int64_t>{0});
  Tensor dbias = torch::stable::new_empty(x, {bias_grad ? N : 0}, ScalarType::Float);
  std::vector<float> factor(static_cast<size_t>(N));
  const float* scales = scale.has_value() ? as_floats(*scale, factor.data()) : nullptr;
  const auto at = [&](const Operand& of, int64_t m, int64_t i) {
    return static_cast<double>(element(of.matrix.at(m, 0).data, format, i));
  };
  if (x_grad) {
    char* out = static_cast<char*>(dx.mutable_data_ptr());
    parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(static_cast<size_t>(K) + 1);
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t k = 0; k < K; ++k) {
          double sum = 0.0;
          for (int64_t b = w.ccol[k / w.bk]; b < w.ccol[k / w.bk + 1]; ++b) {
            for (int64_t i = 0; i < w.bn; ++i) {
              const int64_t n = w.row[b] * w.bn + i;
              double left = n < N ? at(pulled, m, n) : 0.0;
              if (w.int8 && n < N) left = static_cast<double>(static_cast<float>(left) * scales[n]);
              sum += left * static_cast<double>(weight_at(w, format, (w.position[b] * w.bn + i) * w.bk + k % w.bk));
            }
          }
          sums[static_cast<size_t>(k)] = static_cast<float>(sum);
        }
        level.convert(sums.data(), 1.0f, K, out + m * K * size_of(format), format);
      }
    });
  }
  if (values_grad) {
    char* out = static_cast<char*>(dvalues.mutable_data_ptr());
    parallel_for(0, w.down, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(static_cast<size_t>(size));
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t b = w.crow[r]; b < w.crow[r + 1]; ++b) {
          for (int64_t i = 0; i < size; ++i) {
            const int64_t n = r * w.bn + i / w.bk, k = w.col[b] * w.bk + i % w.bk;
            double sum = 0.0;
            for (int64_t m = 0; m < M && n < N && k < K; ++m) sum += at(pulled, m, n) * at(from, m, k);
            sums[static_cast<size_t>(i)] = static_cast<float>(sum);
          }
          level.convert(sums.data(), 1.0f, size, out + b * size * size_of(format), format);
        }
      }
    });
  }
  if (bias_grad) {
    std::vector<double> sums(static_cast<size_t>(N));
    level.add_columns(pulled.matrix, M, N, sums.data());
    std::copy(sums.begin(), sums.end(), dbias.mutable_data_ptr<float>());
  }
  return {dx, dvalues, dbias};
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&burnish::bsr_linear));
  m.impl("bsr_linear.inference", TORCH_BOX(&burnish::bsr_linear));
  m.impl("bsr_linear_backward", TORCH_BOX(&burnish::bsr_linear_backward));
}
