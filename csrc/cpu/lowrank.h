// What lowrank_linear and lora_linear share: s = factor * dropout(x) A^T, y = s B^T on top of a base or of nothing, and
// the gradients.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/float_product.h"
#include "rows.h"

namespace burnish {

// A matrix argument as its kernels see it.
struct Operand {
  Rows rows;
  Matrix matrix;

  explicit Operand(const Tensor& tensor);
};

// The factors, A [R, K] and B [N, R], and what stands between x and them.
struct Factors {
  Operand A, B;
  float factor;
  std::optional<Dropout> dropout;

  Factors(const Tensor& A, const Tensor& B, float factor = 1.0f, std::optional<Dropout> dropout = std::nullopt)
      : A(A), B(B), factor(factor), dropout(dropout) {}

  int64_t rank() const { return A.rows.count; }
  int64_t outputs() const { return B.rows.count; }
  const Dropout* mask() const { return dropout.has_value() ? &*dropout : nullptr; }
};

// Which gradients are wanted.
struct Wanted {
  bool x, factors, bias;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dA, dB, dbias

void check_factors(const char* op, const Tensor& x, const Tensor& A, const Tensor& B);
void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t N);
void check_gradient(const char* op, const Tensor& dy, const Tensor& x, int64_t N);

// s, rounded to the product format of x, or to x's own where `as_x`.
Projection project_down(const Kernels& level, const Operand& x, const Factors& factors, bool as_x, bool transposed,
                        Scratch& scratch);

// y = s B^T + x W^T + bias; without `weight`, [N, K] in x's dtype, the factors alone.
Tensor lowrank_forward(const Tensor& x, const Factors& factors, const Operand* weight,
                       const std::optional<Tensor>& bias);

// The gradients of that.
Gradients lowrank_backward(const Tensor& dy, const Tensor& x, const Factors& factors, const Operand* weight,
                           Wanted wanted);

}  // namespace burnish
