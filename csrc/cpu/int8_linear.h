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

// dx [rows, K] of dx_format = addend + dz w, dz [rows, round_up(N, kGroup)] already scaled and zero beyond N.
void int8_pull(const float* dz, int64_t rows, const Tensor& weight, int64_t N, int64_t K, void* dx, Format dx_format,
               const Addend* addend = nullptr);

}  // namespace burnish
