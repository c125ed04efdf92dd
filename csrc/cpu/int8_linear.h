// The int8 product and its gradient for ops that put something of their own underneath.
#pragma once

#include <functional>
#include <optional>

#include "cpu/arguments.h"
#include "cpu/float_product.h"
#include "rows.h"

namespace burnish {

// Fills sums with what joins the product at these rows and columns, from the column of a whole panel on.
using Addend = std::function<void(Range rows, Range columns, const Sink& sums)>;

void check_int8_operands(const char* op, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                         int64_t K, int64_t activation);

// y [rows, N] of y_format = act(addend + quantised(x) w^T * scales + bias).
void int8_forward(const Rows& rows, Format x_format, const Tensor& weight, const Tensor& scale,
                  const std::optional<Tensor>& bias, int64_t activation, void* y, Format y_format,
                  const Addend* addend = nullptr);

// The weight w [N, K] of a product, its channels not scaled.
class Int8Rows : public Compressed {
 public:
  Int8Rows(const Tensor& weight, int64_t N, int64_t K) : weight_{weight.const_data_ptr<uint8_t>(), N, K} {}

  void take(const Kernels& level, Range rows, Range columns, const Block& out) const override {
    level.unpack_int8(weight_, rows.begin, rows.size(), columns.begin, columns.size(), out.matrix());
  }
  // A panel of channels at a time, which keeps the rounding error near that of a blocked matrix product; bf16 hides it.
  int64_t longest(Format format) const override {
    return format == Format::kFloat ? kPanel : Compressed::longest(format);
  }
  // dz w, dz [.., N] in a product format and scaled.
  Term pull(const Matrix& dz) const { return {dz, {{}, true, nullptr, this}, weight_.channels}; }

 private:
  Int8Weight weight_;
};

}  // namespace burnish
