// Tensors of one element that kernels read, so that the host does not wait for them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {

// fp32 or fp64, or none.
struct DeviceScalar {
  const void* data;
  bool is_double;

  __device__ double value(double fallback) const {
    if (data == nullptr) return fallback;
    return is_double ? load(static_cast<const double*>(data)) : load(static_cast<const float*>(data));
  }
};

inline DeviceScalar device_scalar(const std::optional<torch::stable::Tensor>& scalar) {
  if (!scalar) return {};
  return {scalar->const_data_ptr(), scalar->scalar_type() == torch::headeronly::ScalarType::Double};
}

}  // namespace burnish
