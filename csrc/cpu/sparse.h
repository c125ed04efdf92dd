// What linear layers on a sparse weight share: products and gradients of a weight that is expanded where it is used.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/arguments.h"
#include "cpu/float_product.h"
#include "cpu/lowrank.h"

namespace burnish {

// A weight [N, K] of which some elements are stored.
class SparseWeight : public Compressed {
 public:
  SparseWeight(int64_t N, int64_t K) : N(N), K(K) {}

  // The elements of `dense` [rows, columns], fp32 and zero up to a multiple of 8 columns, at the places of stored ones,
  // into `values` of `format`.
  virtual void give(const Kernels& level, const Block& dense, Range rows, Range columns, void* values,
                    Format format) const = 0;

  // Parts of rows that are a page apart: a few lines of memory in order cost little more than one.
  int64_t together() const override { return 4 * kColumnBlock; }

  const int64_t N, K;
};

// Rows of the weight that a thread takes at least.
constexpr int64_t kWeightRows = 16;

// y = x W^T by products of dense rows: for a few rows of x as they lie, for more packed.
void sparse_product(const Operand& x, const SparseWeight& weight, const Sink& y);

// x in x's format or a product format, with zeros up to a multiple of 64 columns: itself where it is that, else a copy
// in `storage`.
Matrix whole_blocks(const Kernels& level, const Operand& x, Format format, Scratch& storage);

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
