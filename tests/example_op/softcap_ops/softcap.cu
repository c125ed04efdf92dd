// softcap in CUDA C++: see softcap_ops/__init__.py.
//
// Memory-bound: a thread reads 16 bytes once, past L1, and writes 16; a warp's requests take 16 full sectors. Only the
// last thread of an x whose size is no multiple of 16 bytes goes element by element.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "math/half.h"

namespace softcap_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

template <class T>
__device__ T capped(T x, float cap) {
  return burnish::from_float<T>(cap * tanhf(burnish::to_float(x) / cap));
}

template <class T>
__global__ void __launch_bounds__(kThreads) softcap_fwd_kernel(const T* x, T* y, int64_t size, float cap) {
  constexpr int kEach = 16 / sizeof(T);
  struct alignas(16) Unit {
    T element[kEach];
  };
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
  if (first + kEach <= size) {
    const burnish::Bytes16 bytes = burnish::load_streaming(x + first);
    Unit unit;
    memcpy(&unit, &bytes, sizeof unit);
    for (T& element : unit.element) element = capped(element, cap);
    burnish::store(reinterpret_cast<Unit*>(y + first), unit);
    return;
  }
  for (int64_t i = first; i < size; ++i) burnish::store(y + i, capped(burnish::load(x + i), cap));
}

template <class T>
void start(const Tensor& x, const Tensor& y, double cap) {
  constexpr int64_t kPerBlock = int64_t{kThreads} * 16 / sizeof(T);
  const int64_t blocks = (x.numel() + kPerBlock - 1) / kPerBlock;
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("softcap: x is larger than a grid holds");
  burnish::launch(softcap_fwd_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                  burnish::current_stream(x.get_device_index()), static_cast<const T*>(x.const_data_ptr()),
                  static_cast<T*>(y.mutable_data_ptr()), x.numel(), static_cast<float>(cap));
}

Tensor softcap(const Tensor& x, double cap) {
  const burnish::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  Tensor dense = torch::stable::contiguous(x);
  if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 != 0) dense = torch::stable::clone(dense);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      start<float>(dense, y, cap);
      break;
    case ScalarType::BFloat16:
      start<burnish::bf16>(dense, y, cap);
      break;
    case ScalarType::Half:
      start<burnish::fp16>(dense, y, cap);
      break;
    default:
      throw std::runtime_error("softcap: x has another dtype, expected fp32, bf16 or fp16");
  }
  return y;
}

}  // namespace
}  // namespace softcap_ops

STABLE_TORCH_LIBRARY_IMPL(softcap_ops, BURNISH_DEVICE_KEY, m) {
  m.impl("softcap.native", TORCH_BOX(&softcap_ops::softcap));
}
