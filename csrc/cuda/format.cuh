// Floats of any format, in memory.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "format.h"
#include "math/half.h"

namespace burnish {

inline Format format_of(torch::headeronly::ScalarType dtype, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return Format::kFloat;
    case ScalarType::BFloat16:
      return Format::kBf16;
    case ScalarType::Half:
      return Format::kFp16;
    default:
      BURNISH_CHECK(false, op, ".native: ", name, " is not fp32, bf16 or fp16");
  }
}

__device__ inline float load_as_float(const void* data, int64_t i, Format format) {
  if (format == Format::kBf16) return to_float(load(static_cast<const bf16*>(data) + i));
  if (format == Format::kFp16) return to_float(load(static_cast<const fp16*>(data) + i));
  return load(static_cast<const float*>(data) + i);
}

__device__ inline void store_from_float(void* data, int64_t i, Format format, float value) {
  if (format == Format::kBf16) {
    store(static_cast<bf16*>(data) + i, from_float<bf16>(value));
  } else if (format == Format::kFp16) {
    store(static_cast<fp16*>(data) + i, from_float<fp16>(value));
  } else {
    store(static_cast<float*>(data) + i, value);
  }
}

}  // namespace burnish
