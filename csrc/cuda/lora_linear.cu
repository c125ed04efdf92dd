// lora_linear in CUDA C++ for at most 64 rows of x: the kernel of lowrank.cuh with a base of x's type or of int8.
//
// For an int8 base x is quantised by a launch of its own, as int8_linear.cu does; a block would otherwise have to read
// all of x before it could begin.
#include <torch/csrc/stable/library.h>

#include "cuda/int8_quantize_rows.cuh"
#include "cuda/lowrank_host.cuh"

namespace burnish {
namespace {

constexpr int64_t kMaxInt8Width = 131072;  // int32 sums cannot overflow up to here

template <class T, class Base, class S>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_fwd_kernel(LowRankProblem p) {
  lowrank_forward<T, Base, S>(p);
}

// What a base keeps alive while its launch is prepared.
struct BaseTensors {
  Tensor weight, scale, quantised;
};

BaseTensors set_float_base(LowRankProblem& p, const LowRankCall& call, const Tensor& weight) {
  BURNISH_CHECK(weight.dim() == 2 && weight.size(0) == p.B.rows && weight.size(1) == call.x.width &&
                    weight.scalar_type() == call.x.tensor.scalar_type(),
                "lora_linear.native: weight is not [", p.B.rows, ", ", call.x.width, "] in x's dtype");
  const Rows rows = as_rows(weight);
  p.base = operand_of(rows, call.element);
  p.base_x = p.x;
  return {rows.tensor, {}, {}};
}

BaseTensors set_int8_base(LowRankProblem& p, const LowRankCall& call, const Tensor& weight, const Tensor& scale) {
  const int64_t width = round_up(call.x.width, kRowPadding), count = call.x.count;
  BURNISH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 2 && weight.is_contiguous() &&
                    weight.size(0) == p.B.rows && weight.size(1) == width,
                "lora_linear.native: weight is not int8 [", p.B.rows, ", ", width, "], contiguous");
  BURNISH_CHECK(scale.scalar_type() == ScalarType::Float && scale.numel() == p.B.rows,
                "lora_linear.native: weight_scale is not fp32 [", p.B.rows, "]");
  BURNISH_CHECK(width <= kMaxInt8Width, "lora_linear.native: K is ", call.x.width, ", expected at most ", kMaxInt8Width,
                " for an int8 weight");
  const bool aligned = reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
  BaseTensors kept{aligned ? weight : torch::stable::clone(weight), torch::stable::contiguous(scale),
                   torch::stable::new_empty(call.x.tensor, {count * (width + static_cast<int64_t>(sizeof(float)))},
                                            ScalarType::Char)};
  int8_t* q = kept.quantised.mutable_data_ptr<int8_t>();
  float* row_scale = reinterpret_cast<float*>(q + count * width);
  quantize_rows(call.x, q, width, row_scale, current_stream(weight.get_device_index()));
  p.base = operand_of({kept.weight, p.B.rows, width, width}, 1);
  p.base_x = operand_of({kept.quantised, count, width, width}, 1);
  p.scale = kept.scale.const_data_ptr<float>();
  p.row_scale = row_scale;
  return kept;
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& weight_scale,
                   const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& seed, double scale, double p_drop, int64_t format) {
  const LowRankCall call("lora_linear", x, A, B, bias);
  BURNISH_CHECK(p_drop >= 0.0 && p_drop <= 1.0, "lora_linear.native: p is ", p_drop, ", expected 0 to 1");
  BURNISH_CHECK(format == 0 || (format == 1 && weight_scale.has_value()), "lora_linear.native: format is ", format,
                ", expected 0, or 1 with a weight_scale");
  const uint32_t threshold = dropout_threshold(p_drop);
  BURNISH_CHECK(threshold == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                "lora_linear.native: seed is not int64 [1], p is ", p_drop);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = call.new_result();
  if (y.numel() == 0) return y;

  LowRankProblem p = call.problem(y, scale * dropout_factor(threshold));
  p.threshold = threshold;
  p.seed = threshold > 0 ? seed->const_data_ptr<int64_t>() : nullptr;
  const bool quantised = format == 1;
  const BaseTensors kept = quantised ? set_int8_base(p, call, weight, *weight_scale) : set_float_base(p, call, weight);
  call.start([&]<class T, class S>() {
    start_lowrank<T, S>(quantised ? lora_linear_fwd_kernel<T, int8_t, S> : lora_linear_fwd_kernel<T, T, S>, p, x);
  });
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("lora_linear.native", TORCH_BOX(&burnish::lora_linear));
}
