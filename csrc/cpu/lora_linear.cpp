// lora_linear and lora_linear_backward on the CPU: see burnish/ops/lora_linear.py, and burnish/bases.py for the formats
// of the base.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "cpu/int8_linear.h"
#include "cpu/lowrank.h"
#include "cpu/parallel.h"
#include "math/philox.h"

namespace burnish {
namespace {

// Whether the weight lies by columns, as transformers' Conv1D holds it: then its transpose is read, not a copy.
bool lies_by_columns(const Tensor& weight) {
  return weight.stride(0) == 1 && weight.stride(1) >= weight.size(0) && weight.size(0) > 1 && weight.size(1) > 1;
}

class FloatBase : public Base {
 public:
  explicit FloatBase(const Tensor& weight)
      : turned_(lies_by_columns(weight)), weight_(turned_ ? torch::stable::transpose(weight, 0, 1) : weight) {}

  int64_t few_rows() const override { return kDotRows; }

  void forward(const Kernels& level, const Operand& x, const Term& low, const Sink& y) const override {
    static thread_local Scratch copies;
    const int64_t M = x.rows.count, K = x.rows.width, N = turned_ ? weight_.rows.width : weight_.rows.count;
    if (low.x.format == x.matrix.format && M <= kDotRows) {
      return add_few_rows(level, {low, {x.matrix, {weight_.matrix, turned_}, K}}, M, N, y);
    }
    const Matrix from = in_product_format(level, x.matrix, M, K, copies);
    add_products_parallel(level, {low, {from, {weight_.matrix, turned_}, K}}, M, N, y);
    copies.trim();
  }

  void backward(const Kernels& level, const Operand& dy, const Term& low, const Dropout* keep,
                const Sink& dx) const override {
    static thread_local Scratch copies;
    const int64_t M = dy.rows.count, N = dy.rows.width, K = turned_ ? weight_.rows.count : weight_.rows.width;
    const Matrix from = in_product_format(level, dy.matrix, M, N, copies);
    add_products_parallel(level, {low, {from, {weight_.matrix, !turned_}, N}}, M, K, dx, keep);
    copies.trim();
  }

 private:
  bool turned_;
  Operand weight_;
};

class Int8Base : public Base {
 public:
  Int8Base(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias, int64_t K)
      : weight_(weight), scale_(scale), bias_(bias), K_(K) {}

  int64_t few_rows() const override { return kFewRows; }

  void forward(const Kernels& level, const Operand& x, const Term& low, const Sink& y) const override {
    static thread_local Scratch copies;
    const Term from{in_product_format(level, low.x, x.rows.count, low.depth, copies), low.weight, low.depth};
    const Addend addend = [&](Range rows, Range columns, const Sink& sums) {
      add_products(level, {from.below(rows.begin)}, rows.size(), columns, sums.at(0, -columns.begin));
    };
    int8_forward(x.rows, x.matrix.format, weight_, scale_, bias_, 0, y.y, y.y_format, &addend);
  }

  void backward(const Kernels& level, const Operand& dy, const Term& low, const Dropout* keep,
                const Sink& dx) const override {
    static thread_local Scratch scratch;
    const int64_t M = dy.rows.count, N = dy.rows.width;
    scratch.reserve(Block::bytes(M, N, low.x.format) + Scratch::bytes<float>(N));
    const Block dz = Block::take(scratch, M, N, low.x.format);
    scale_columns(level, dy.matrix, M, as_floats(scale_, scratch.take<float>(N)), N, dz);
    const Int8Rows w(weight_, N, K_);
    add_products_parallel(level, {low, w.pull(dz.matrix())}, M, K_, dx, keep);
    scratch.trim();
  }

 private:
  const Tensor& weight_;
  const Tensor& scale_;
  const std::optional<Tensor>& bias_;
  int64_t K_;
};

struct Checked {
  std::unique_ptr<Base> base;
  int64_t outputs;
};

Checked check_base(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& bias, int64_t format) {
  const int64_t K = x.size(x.dim() - 1);
  BURNISH_CHECK(format == 0 || format == 1, op, ": format is ", format, ", expected 0 to 1");
  if (format == 1) {
    BURNISH_CHECK(scale.has_value(), op, ": weight_scale is None, expected fp32 [N] for an int8 weight");
    check_int8_operands(op, weight, *scale, std::nullopt, K, 0);
    return {std::make_unique<Int8Base>(weight, *scale, bias, K), scale->size(0)};
  }
  check_cpu(op, "weight", weight);
  BURNISH_CHECK(!scale.has_value(), op, ": weight_scale is given, expected None for a float weight");
  BURNISH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight is ", dtype_name(weight.scalar_type()),
                ", expected ", dtype_name(x.scalar_type()), " as x is");
  BURNISH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == K, op, ": weight has shape ",
                shape_text(weight), ", expected [N, ", K, "] with N >= 1");
  return {std::make_unique<FloatBase>(weight), weight.size(0)};
}

Factors check_adapter(const char* op, const Tensor& A, const Tensor& B, const std::optional<Tensor>& seed, double scale,
                      double p, int64_t outputs) {
  BURNISH_CHECK(B.size(0) == outputs, op, ": B has shape ", shape_text(B), ", expected [", outputs,
                ", R] for the base's ", outputs, " outputs");
  BURNISH_CHECK(p >= 0.0 && p <= 1.0, op, ": p is ", p, ", expected 0 to 1");
  BURNISH_CHECK(p == 0.0 || seed.has_value(), op, ": seed is None, expected int64 [1] for p = ", p);
  if (seed.has_value()) {
    check_cpu(op, "seed", *seed);
    BURNISH_CHECK(seed->scalar_type() == ScalarType::Long && seed->dim() == 1 && seed->size(0) == 1, op, ": seed is ",
                  dtype_name(seed->scalar_type()), " ", shape_text(*seed), ", expected int64 [1]");
  }
  const uint32_t threshold = dropout_threshold(p);
  std::optional<Dropout> dropout;
  if (threshold > 0) dropout = {static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), threshold};
  return {A, B, static_cast<float>(scale * dropout_factor(threshold)), dropout};
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& weight_scale,
                   const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& seed, double scale, double p, int64_t format) {
  constexpr const char* kOp = "lora_linear";
  check_factors(kOp, x, A, B);
  const Checked checked = check_base(kOp, x, weight, weight_scale, bias, format);
  const Factors factors = check_adapter(kOp, A, B, seed, scale, p, checked.outputs);
  check_bias(kOp, bias, checked.outputs);
  return lowrank_forward(x, factors, checked.base.get(), bias);
}

Gradients lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& weight_scale, const Tensor& A, const Tensor& B,
                               const std::optional<Tensor>& seed, double scale, double p, int64_t format, bool x_grad,
                               bool factor_grad, bool bias_grad) {
  constexpr const char* kOp = "lora_linear_backward";
  check_factors(kOp, x, A, B);
  const std::optional<Tensor> none;
  const Checked checked = check_base(kOp, x, weight, weight_scale, none, format);
  const Factors factors = check_adapter(kOp, A, B, seed, scale, p, checked.outputs);
  check_gradient(kOp, dy, x, checked.outputs);
  return lowrank_backward(dy, x, factors, checked.base.get(), {x_grad, factor_grad, bias_grad});
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&burnish::lora_linear));
  m.impl("lora_linear.inference", TORCH_BOX(&burnish::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&burnish::lora_linear_backward));
}
