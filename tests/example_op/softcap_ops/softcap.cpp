// softcap and softcap_backward on the CPU: see softcap_ops/__init__.py. fp32 arithmetic, one rounding at the end.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <stdexcept>
#include <string>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 4096;

void check(bool good, const std::string& message) {
  if (!good) throw std::runtime_error(message);
}

void check_operand(const std::string& op, const std::string& name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(t.is_cpu(), op + ": " + name + " is on another device, expected cpu");
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
        op + ": " + name + " has another dtype, expected fp32, bf16 or fp16");
}

void check_cap(const std::string& op, double cap) {
  check(cap > 0, op + ": cap is " + std::to_string(cap) + ", expected more than 0");
}

template <class F>
void with_type(ScalarType type, const F& f) {
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::BFloat16) return f(torch::headeronly::BFloat16{});
  f(torch::headeronly::Half{});
}

Tensor softcap(const Tensor& x, double cap) {
  check_operand("softcap", "x", x);
  check_cap("softcap", cap);
  const Tensor dense = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const auto limit = static_cast<float>(cap);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* in = dense.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        out[i] = static_cast<T>(limit * std::tanh(static_cast<float>(in[i]) / limit));
      }
    });
  });
  return y;
}

Tensor softcap_backward(const Tensor& dy, const Tensor& x, double cap) {
  check_operand("softcap_backward", "dy", dy);
  check_operand("softcap_backward", "x", x);
  check_cap("softcap_backward", cap);
  check(dy.sizes().vec() == x.sizes().vec(), "softcap_backward: dy has another shape than x");
  check(dy.scalar_type() == x.scalar_type(), "softcap_backward: dy has another dtype than x");
  const Tensor dense_dy = torch::stable::contiguous(dy);
  const Tensor dense_x = torch::stable::contiguous(x);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  const auto limit = static_cast<float>(cap);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* slope = dense_dy.const_data_ptr<T>();
    const T* in = dense_x.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float t = std::tanh(static_cast<float>(in[i]) / limit);
        out[i] = static_cast<T>(static_cast<float>(slope[i]) * (1.0f - t * t));
      }
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softcap_ops, CPU, m) {
  m.impl("softcap", TORCH_BOX(&softcap));
  m.impl("softcap.inference", TORCH_BOX(&softcap));
  m.impl("softcap_backward", TORCH_BOX(&softcap_backward));
}
