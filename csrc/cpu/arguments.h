// Argument checks of the CPU ops. Messages name op, argument, what came and what is allowed, as the Python records do;
// here they also keep kernels from reading out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cpu/kernels.h"
#include "math/half.h"
#include "math/pack.h"
#include "tensor_text.h"

namespace burnish {

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  BURNISH_CHECK(tensor.is_cpu(), op, ": ", name, " is on another device, expected cpu");
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  BURNISH_CHECK(is_floating(tensor.scalar_type()), op, ": ", name, " is ", dtype_name(tensor.scalar_type()),
                ", expected fp32, bf16 or fp16");
}

// `packed` is a run-time layout of an [N, K] weight; with `vnni_only`, the one that CPU kernels take.
inline void check_packed(const char* op, const char* name, const Tensor& packed, int64_t N, int64_t K, bool vnni_only) {
  check_cpu(op, name, packed);
  const ScalarType type = packed.scalar_type();
  const bool vnni = type == ScalarType::Byte;
  BURNISH_CHECK(vnni || (type == ScalarType::Char && !vnni_only), op, ": ", name, " is ", dtype_name(type),
                vnni_only ? ", expected uint8 (vnni) from int8_linear_pack"
                          : ", expected uint8 (vnni) or int8 (rows) from int8_linear_pack");
  const int64_t rows = vnni ? round_up(N, kGroup) : N;
  const int64_t width = round_up(K, vnni ? kDepth : kRowPadding);
  BURNISH_CHECK(packed.dim() == 2 && packed.size(0) == rows && packed.size(1) == width, op, ": ", name, " has shape ",
                shape_text(packed), ", expected (", rows, ", ", width, ") for N=", N, ", K=", K,
                ": pack it by int8_linear_pack");
  BURNISH_CHECK(packed.is_contiguous(), op, ": ", name, " is not contiguous, expected int8_linear_pack's result");
}

// An fp32 contiguous view of a vector: itself, or a copy in `storage`.
inline const float* as_floats(const Tensor& vector, float* storage) {
  const Format format = format_of(vector.scalar_type());
  const int64_t count = vector.size(0), stride = count > 1 ? vector.stride(0) : 1;
  const void* data = vector.const_data_ptr();
  if (stride == 1 && format == Format::kFloat) return static_cast<const float*>(data);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * stride;
    storage[i] = format == Format::kBf16   ? to_float(static_cast<const bf16*>(data)[at])
                 : format == Format::kFp16 ? to_float(static_cast<const fp16*>(data)[at])
                                           : static_cast<const float*>(data)[at];
  }
  return storage;
}

}  // namespace burnish
