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

// The frozen layer that the factors stand on. Another format joins by these two functions, which compute its product
// on top of the factors' (`low`), in fp32 and rounded once.
class Base {
 public:
  virtual ~Base() = default;
  // Rows of x up to which `low` may have its X in x's own format: at most kDotRows.
  virtual int64_t few_rows() const = 0;
  // y = low + x W^T + bias
  virtual void forward(const Kernels& level, const Operand& x, const Term& low, const Sink& y) const = 0;
  // dx = keep * low + dy W
  virtual void backward(const Kernels& level, const Operand& dy, const Term& low, const Dropout* keep,
                        const Sink& dx) const = 0;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dA, dB, dbias

void check_factors(const char* op, const Tensor& x, const Tensor& A, const Tensor& B);
void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t N);
void check_gradient(const char* op, const Tensor& dy, const Tensor& x, int64_t N);

// y = s B^T + bias, on top of `base`, or without one (null).
Tensor lowrank_forward(const Tensor& x, const Factors& factors, const Base* base, const std::optional<Tensor>& bias);

// The gradients of that.
Gradients lowrank_backward(const Tensor& dy, const Tensor& x, const Factors& factors, const Base* base, Wanted wanted);

// y = the sum of the terms for a few rows, at most kDotRows: each weight is read as it lies, from memory, or where it
// is transposed turned a piece at a time; X is in the weights' own format. A weight of little depth alone is better
// packed for more than kFewRows.
constexpr int64_t kFewRows = 2;
void add_few_rows(const Kernels& level, const std::vector<Term>& terms, int64_t rows, int64_t N, const Sink& y);

}  // namespace burnish
