// sparse24_linear and sparse24_linear_backward on the CPU: see burnish/ops/sparse24_linear.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sparse.h"
#include "math/sparse24.h"

namespace burnish {
namespace {

constexpr int64_t kMaxDepth = 131072;
constexpr int64_t kFewRowsExpanded = 12;               // of x, up to which weights of fp32 and fp16 are better expanded
constexpr int64_t kSerialElements = int64_t{1} << 18;  // of the weight: what a second thread must be worth

class Grouped : public SparseWeight {
 public:
  Grouped(const Sparse24Weight& weight, Stored stored)
      : SparseWeight(weight.rows, weight.width), weight_(weight), stored_(stored) {}

  void take(const Kernels& level, Range rows, Range columns, const Block& out) const override {
    level.expand_sparse24(weight_, stored_, rows.begin, rows.size(), columns.begin, columns.size(), out.matrix());
  }
  void give(const Kernels& level, const Block& dense, Range rows, Range columns, void* values,
            Format format) const override {
    level.compress_sparse24(weight_, rows.begin, rows.size(), columns.begin, round_up(columns.size(), kStep24),
                            dense.matrix(), values, format);
  }

 private:
  const Sparse24Weight weight_;
  const Stored stored_;
};

Sparse24Weight weight_of(const Tensor& x, const Tensor& values, const Tensor& metadata) {
  return {values.const_data_ptr(), metadata.const_data_ptr<uint8_t>(), metadata.size(1), metadata.size(0),
          x.size(x.dim() - 1)};
}

void check_operands(const char* op, const Tensor& x, const Tensor& values, const Tensor& metadata,
                    const std::optional<Tensor>& scale) {
  check_floating(op, "x", x);
  BURNISH_CHECK(x.dim() >= 1, op, ": x is a scalar, expected at least one dimension");
  check_cpu(op, "values", values);
  check_cpu(op, "metadata", metadata);
  const bool as_int8 = scale.has_value();
  const ScalarType wanted = as_int8 ? ScalarType::Char : x.scalar_type();
  BURNISH_CHECK(values.scalar_type() == wanted, op, ": values are ", dtype_name(values.scalar_type()), ", expected ",
                dtype_name(wanted), as_int8 ? " with a scale" : " as x is, or int8 with a scale");
  BURNISH_CHECK(metadata.scalar_type() == ScalarType::Byte, op, ": metadata is ", dtype_name(metadata.scalar_type()),
                ", expected uint8");
  const int64_t K = x.size(x.dim() - 1), width = round_up(K, kStep24);
  BURNISH_CHECK(metadata.dim() == 2 && metadata.size(0) >= 1 && metadata.size(1) == width / kStep24, op,
                ": metadata has shape ", shape_text(metadata), ", expected [N, ", width / kStep24,
                "] with N >= 1 for K=", K);
  const int64_t N = metadata.size(0);
  BURNISH_CHECK(values.dim() == 2 && values.size(0) == N && values.size(1) == width / 2, op, ": values have shape ",
                shape_text(values), ", expected (", N, ", ", width / 2, ") as metadata has");
  BURNISH_CHECK(values.is_contiguous(), op, ": values are not contiguous, expected compress's result");
  BURNISH_CHECK(metadata.is_contiguous(), op, ": metadata is not contiguous, expected compress's result");
  if (!as_int8) return;
  check_cpu(op, "scale", *scale);
  BURNISH_CHECK(scale->scalar_type() == ScalarType::Float, op, ": scale is ", dtype_name(scale->scalar_type()),
                ", expected fp32");
  BURNISH_CHECK(scale->dim() == 1 && scale->size(0) == N, op, ": scale has shape ", shape_text(*scale), ", expected [",
                N, "]");
  BURNISH_CHECK(K <= kMaxDepth, op, ": K is ", K, ", expected at most ", kMaxDepth, ": int32 sums could overflow");
}

// Blocks of the weight's rows, by all threads.
template <class F>
void for_blocks(const Sparse24Weight& weight, const F& f) {
  const int64_t blocks = (weight.rows + kWeightRows - 1) / kWeightRows;
  const int64_t grain =
      std::max<int64_t>(1, kSerialElements / kWeightRows / std::max<int64_t>(1, weight.row_bytes * kStep24));
  balanced_for(0, blocks, grain,
               [&](int64_t begin, int64_t end) { f(begin * kWeightRows, std::min(end * kWeightRows, weight.rows)); });
}

// y = float(q W^T) * (row scale * scale) + bias, q the quantised rows of x.
void multiply_int8(const Operand& x, const Sparse24Weight& weight, const float* scale, const float* bias, void* y) {
  static thread_local Scratch scratch;
  const Kernels& level = kernels();
  const int64_t M = x.rows.count, K = x.rows.width, stride = round_up(K, 128) + 64;
  scratch.reserve(Scratch::bytes<int8_t>(M * stride) + Scratch::bytes<float>(M));
  auto* q = scratch.take<int8_t>(M * stride);
  auto* row_scale = scratch.take<float>(M);
  parallel_for(0, M, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, K)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      int8_t* row = q + m * stride;
      level.quantize_row(x.matrix.at(m, 0).data, x.matrix.format, K, stride, row, row_scale + m);
      for (int64_t k = 0; k < stride; ++k) row[k] = static_cast<int8_t>(row[k] ^ level.sparse24_offset);
    }
  });
  const Sparse24Int8 args{weight, q, stride, M, row_scale, scale, bias, y, x.matrix.format};
  for_blocks(weight, [&](int64_t begin, int64_t end) {
    static thread_local Scratch spare;
    spare.reserve(Scratch::bytes<char>(sparse24_spare(weight.row_bytes)));
    level.sparse24_int8(args, begin, end, spare.take<char>(sparse24_spare(weight.row_bytes)));
  });
  scratch.trim();
}

// y = x W^T by the stored elements alone, or false: it takes a kernel of the level's, and a finite x.
bool multiply_stored(const Operand& x, const Sparse24Weight& weight, const Sink& y) {
  static thread_local Scratch padded;
  const Kernels& level = kernels();
  const Format stored = x.matrix.format;
  const bool paired = stored == Format::kBf16, few = x.rows.count <= (paired ? kFewRowsSparse : kFewRowsExpanded);
  if (few ? !paired || level.sparse24_dot == nullptr : level.sparse24_wide == nullptr) return false;
  if (!is_finite(x)) return false;
  const Matrix rows = whole_blocks(level, x, level.product_format(stored), padded);
  for_blocks(weight, [&](int64_t begin, int64_t end) {
    static thread_local Scratch spare;
    if (few) return level.sparse24_dot(weight, rows, x.rows.count, begin, end, y);
    spare.reserve(Scratch::bytes<char>(kSparse24WideBytes));
    level.sparse24_wide(weight, stored, rows, x.rows.count, begin, end, spare.take<char>(kSparse24WideBytes), y);
  });
  padded.trim();
  return true;
}

Tensor sparse24_linear(const Tensor& x, const Tensor& values, const Tensor& metadata,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "sparse24_linear";
  static thread_local Scratch floats;
  check_operands(kOp, x, values, metadata, scale);
  const int64_t N = metadata.size(0);
  check_bias(kOp, bias, N);
  const Format format = format_of(x.scalar_type());
  Tensor made = torch::stable::new_empty(x, sizes_with_last(x, N));
  floats.reserve(2 * Scratch::bytes<float>(N));
  const Operand rows(x);
  const Sink y = all_of(made.mutable_data_ptr(), rows.rows.count, N, format,
                        bias.has_value() ? as_floats(*bias, floats.take<float>(N)) : nullptr);
  const Sparse24Weight weight = weight_of(x, values, metadata);
  if (scale.has_value()) {
    multiply_int8(rows, weight, as_floats(*scale, floats.take<float>(N)), y.bias, y.y);
  } else if (!multiply_stored(rows, weight, y)) {
    sparse_product(rows, Grouped(weight, static_cast<Stored>(format)), y);
  }
  return made;
}

SparseGradients sparse24_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                         const Tensor& metadata, const std::optional<Tensor>& scale, bool x_grad,
                                         bool values_grad, bool bias_grad) {
  constexpr const char* kOp = "sparse24_linear_backward";
  static thread_local Scratch floats;
  check_operands(kOp, x, values, metadata, scale);
  const int64_t N = metadata.size(0);
  check_gradient(kOp, dy, x, N);
  BURNISH_CHECK(!(values_grad && scale.has_value()), kOp, ": values_grad is True, but int8 values have no gradient");
  floats.reserve(Scratch::bytes<float>(N));
  const float* factors = scale.has_value() ? as_floats(*scale, floats.take<float>(N)) : nullptr;
  const Stored stored = scale.has_value() ? Stored::kInt8 : static_cast<Stored>(format_of(x.scalar_type()));
  const Grouped weight(weight_of(x, values, metadata), stored);
  return sparse_backward(dy, x, weight, values, factors, {x_grad, values_grad, bias_grad});
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("sparse24_linear", TORCH_BOX(&burnish::sparse24_linear));
  m.impl("sparse24_linear.inference", TORCH_BOX(&burnish::sparse24_linear));
  m.impl("sparse24_linear_backward", TORCH_BOX(&burnish::sparse24_linear_backward));
}
