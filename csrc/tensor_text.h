// The words of messages about arguments: op, argument, what came and what is allowed, as the Python records have them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "check.h"
#include "format.h"

namespace burnish {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "fp32";
    case ScalarType::BFloat16:
      return "bf16";
    case ScalarType::Half:
      return "fp16";
    case ScalarType::Double:
      return "fp64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "of another dtype";
  }
}

template <class AnyTensor>
std::string shape_text(const AnyTensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Format format_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? Format::kBf16 : type == ScalarType::Half ? Format::kFp16 : Format::kFloat;
}

}  // namespace burnish
