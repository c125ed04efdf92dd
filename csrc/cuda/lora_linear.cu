// lora_linear in CUDA C++: for at most 64 rows of x the kernel of lowrank.cuh with a base of x's type or of int8, for
// more of them the kernel of lora_wide.cuh, where it may be launched, with a base of x's type.
//
// For an int8 base x is quantised by a launch of its own, as int8_linear.cu does; a block would otherwise have to read
// all of x before it could begin.
#include <torch/csrc/stable/library.h>

#include "cuda/int8_quantize_rows.cuh"
#include "cuda/lora_wide.cuh"
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
  const bool many = call.x.count > kMaxLowRankRows;
  const Rows rows = many ? aligned_rows(as_rows(weight), call.element) : as_rows(weight);
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

template <class S>
void start_wide(LowRankProblem p, const Tensor& x) {
  const int64_t tiles = ceil_div(p.x.rows, S::kRows) * ceil_div(p.B.rows, S::kTileChannels);
  BURNISH_CHECK(tiles < (int64_t{1} << 31), "lora_linear.native: y has ", p.x.rows, " rows of ", p.B.rows,
                ", more than a kernel counts");
  const Tensor low = torch::stable::new_empty(x, {p.x.rows, p.rank});
  const Counters counters = counters_of(x);
  p.counter = counters.barrier();
  const Operand s = operand_of({low, p.x.rows, p.rank, p.rank}, sizeof(typename S::T));
  const auto map = [](const Operand& of, int rows) { return wide_map(of, rows, S::kStageBytes, Swizzle::k128); };
  const WideLoraMaps maps{map(p.x, S::Ring::kXRows),
                          map(p.base, kWideChannels),
                          map(s, S::Ring::kXRows),
                          map(p.B, kWideChannels),
                          map(p.x, S::kLowRows),
                          map(p.A, p.rank),
                          wide_map_of_y(p.y, p.x.rows, p.B.rows)};
  const auto kernel = lora_linear_fwd_kernel_wide<S>;
  const dim3 block(kWideBlock);
  const int64_t places = resident_blocks(kernel, block, S::kShared, x.get_device_index(), S::kCluster);
  launch_cooperative_clusters(kernel, dim3(static_cast<unsigned>(std::min(tiles * S::kCluster, places))), block,
                              S::kCluster, S::kShared, current_stream(x.get_device_index()), p,
                              static_cast<typename S::T*>(low.mutable_data_ptr()), maps);
}

template <class T>
void start_many_rows(const LowRankProblem& p, const Tensor& x) {
  using Large = WideLora<T, 256>;
  const int64_t tiles = ((p.x.rows - 1) / Large::kRows + 1) * ((p.B.rows - 1) / kWideChannels + 1);
  const bool few = tiles < device_limits(x.get_device_index()).multiprocessors;
  few ? start_wide<WideLora<T, 128>>(p, x) : start_wide<Large>(p, x);
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& weight_scale,
                   const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& seed, double scale, double p_drop, int64_t format) {
  LowRankCall call("lora_linear", x, A, B, bias);
  BURNISH_CHECK(p_drop >= 0.0 && p_drop <= 1.0, "lora_linear.native: p is ", p_drop, ", expected 0 to 1");
  BURNISH_CHECK(format == 0 || (format == 1 && weight_scale.has_value()), "lora_linear.native: format is ", format,
                ", expected 0, or 1 with a weight_scale");
  const uint32_t threshold = dropout_threshold(p_drop);
  BURNISH_CHECK(threshold == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                "lora_linear.native: seed is not int64 [1], p is ", p_drop);
  const bool quantised = format == 1, many = call.x.count > kMaxLowRankRows;
  if (many) {
    BURNISH_CHECK(!quantised && call.element == 2 && call.x.width % 8 == 0 && call.B.count % 8 == 0 &&
                      call.A.count % 8 == 0 && call.A.count <= kMaxWideRank && call.x.width > 0 && call.A.count > 0 &&
                      call.x.count <= kMaxWideRows && device_limits(x.get_device_index()).warpgroups,
                  "lora_linear.native: more than ", kMaxLowRankRows, " rows take a weight, bf16 or fp16, on sm_90, ",
                  "with K, N and R multiples of 8 and R at most ", kMaxWideRank);
    call.align();
  } else {
    call.expect_few_rows("lora_linear");
  }
  const DeviceGuard guard(x.get_device_index());
  Tensor y = call.new_result();
  if (y.numel() == 0) return y;

  LowRankProblem p = call.problem(y, scale * dropout_factor(threshold));
  p.threshold = threshold;
  p.seed = threshold > 0 ? seed->const_data_ptr<int64_t>() : nullptr;
  const BaseTensors kept = quantised ? set_int8_base(p, call, weight, *weight_scale) : set_float_base(p, call, weight);
  if (many) {
    x.scalar_type() == ScalarType::BFloat16 ? start_many_rows<bf16>(p, x) : start_many_rows<fp16>(p, x);
    return y;
  }
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
