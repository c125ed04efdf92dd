// What linear layers on a sparse weight share: products and gradients of a weight that is expanded where it is used.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/arguments.h"
#include "cpu/float_product.h"
#include "cpu/lowrank.h"

namespace burnish {

// A weight [N, K] as a bitmap and values of one format, or int8.
class SparseWeight : public Compressed {
 public:
  SparseWeight(int64_t N, int64_t K, const Tensor& values);

  void take(const Kernels& level, Range rows, Range columns, const Block& out) const override;
  // Elements of `dense` [rows, columns] at the places of the stored ones, into `values`.
  void give(const Kernels& level, const Block& dense, Range rows, Range columns, void* values) const;

  const int64_t N, K;

 protected:
  // Which elements of a row are stored, from a column that is a multiple of 8 on; `storage` has (count + 7) / 8 bytes.
  virtual const uint8_t* bits(const Kernels& level, int64_t row, Range columns, uint8_t* storage) const = 0;
  // Where in the values those begin.
  virtual int64_t place(const Kernels& level, int64_t row, int64_t column) const = 0;

 private:
  const char* values_;
  ScalarType type_;
  int64_t size_;  // bytes of a value
};

// Rows of the weight that a thread takes at least.
constexpr int64_t kWeightRows = 16;

// y = x W^T by products of dense rows: for a few rows of x as they lie, for more packed.
void sparse_product(const Operand& x, const SparseWeight& weight, const Sink& y);

// x with zeros up to a multiple of 64 columns: itself where it has as many, else a copy in `storage`.
Matrix whole_blocks(const Operand& x, Scratch& storage);

// Whether no element of x is an infinity or NaN.
bool is_finite(const Operand& x);

struct SparseWanted {
  bool x, values, bias;
};

using SparseGradients = std::tuple<Tensor, Tensor, Tensor>;  // dx, dvalues, dbias

// dx = (dy * scale) W, dvalues = dy^T x where `weight` is stored, dbias = the sum of dy's rows. scale: [N], or null.
SparseGradients sparse_backward(const Tensor& dy, const Tensor& x, const SparseWeight& weight, const Tensor& values,
                                const float* scale, SparseWanted wanted);

}  // namespace burnish
