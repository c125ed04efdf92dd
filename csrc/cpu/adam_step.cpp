// adam_step on the CPU: see burnish/ops/adam_step.py. Everything is checked before anything is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <utility>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"

namespace burnish {
namespace {

constexpr const char* kOp = "adam_step";
constexpr int64_t kBlocksPerTask = 64;  // 16384 elements: some microseconds

struct Lists {
  const Tensors &params, &grads, &steps, &firsts, &seconds, &greatest, &scales, &masters, &averages, &masks;
};

// The dtype that a list has throughout, one of `allowed`.
ScalarType common_dtype(const char* name, const Tensors& list, std::initializer_list<ScalarType> allowed,
                        const char* expected) {
  const ScalarType type = list.front().scalar_type();
  for (size_t i = 0; i < list.size(); ++i) {
    const ScalarType own = list[i].scalar_type();
    BURNISH_CHECK(std::find(allowed.begin(), allowed.end(), own) != allowed.end(), kOp, ": ", item_name(name, i),
                  " is ", dtype_name(own), ", expected ", expected);
    BURNISH_CHECK(own == type, kOp, ": ", item_name(name, i), " is ", dtype_name(own), ", expected ", dtype_name(type),
                  " as the others are");
  }
  return type;
}

void check_range(const char* name, double value, double below, const char* expected) {
  BURNISH_CHECK(value >= 0 && value < below, kOp, ": ", name, " is ", value, ", expected ", expected);
}

void check_lengths(const Lists& lists) {
  const size_t count = lists.params.size();
  check_list(kOp, "grads", lists.grads, count, false);
  check_list(kOp, "steps", lists.steps, count, false);
  check_list(kOp, "exp_avgs", lists.firsts, count, false);
  check_list(kOp, "exp_avg_sqs", lists.seconds, count, false);
  check_list(kOp, "max_exp_avg_sqs", lists.greatest, count, true);
  check_list(kOp, "scales", lists.scales, count, true);
  check_list(kOp, "masters", lists.masters, count, true);
  check_list(kOp, "emas", lists.averages, count, true);
  check_list(kOp, "masks", lists.masks, count, true);
}

// What the dtypes of the lists ask for.
void set_formats(const Lists& lists, AdamRule& rule) {
  const ScalarType first = common_dtype(
      "exp_avgs", lists.firsts, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Char}, "fp32, bf16 or int8");
  rule.coded = first == ScalarType::Char;
  rule.moments = first == ScalarType::BFloat16 ? Format::kBf16 : Format::kFloat;
  const ScalarType second = rule.coded ? ScalarType::Byte : first;
  const std::string expected = dtype_name(second) + ", since exp_avgs are " + dtype_name(first);
  common_dtype("exp_avg_sqs", lists.seconds, {second}, expected.c_str());
  if (!lists.greatest.empty()) common_dtype("max_exp_avg_sqs", lists.greatest, {second}, expected.c_str());
  BURNISH_CHECK(lists.scales.empty() != rule.coded, kOp, ": scales has ", lists.scales.size(), " tensors, expected ",
                rule.coded ? lists.params.size() : 0, ", since exp_avgs are ", dtype_name(first));
  if (!lists.averages.empty()) common_dtype("emas", lists.averages, {ScalarType::Float}, "fp32");
  if (!lists.masks.empty()) common_dtype("masks", lists.masks, {ScalarType::Bool}, "bool");
  if (!lists.masters.empty()) {
    const ScalarType master =
        common_dtype("masters", lists.masters, {ScalarType::Float, ScalarType::Byte}, "fp32 or uint8");
    rule.master = master == ScalarType::Float ? Master::kFloat : Master::kSplit;
  }
}

void check_item(const Lists& lists, const AdamRule& rule, size_t i) {
  const Tensor& parameter = lists.params[i];
  check_floating(kOp, item_name("params", i).c_str(), parameter);
  check_dense(kOp, "params", i, parameter);
  check_floating(kOp, item_name("grads", i).c_str(), lists.grads[i]);
  for (const auto& [name, list] :
       {std::pair("grads", &lists.grads), std::pair("exp_avgs", &lists.firsts),
        std::pair("exp_avg_sqs", &lists.seconds), std::pair("max_exp_avg_sqs", &lists.greatest),
        std::pair("masters", &lists.masters), std::pair("emas", &lists.averages), std::pair("masks", &lists.masks)}) {
    if (list->empty()) continue;
    BURNISH_CHECK((*list)[i].is_cpu(), kOp, ": ", item_name(name, i), " is on another device, expected cpu");
    check_alike(kOp, name, i, (*list)[i], parameter);
  }
  BURNISH_CHECK(lists.steps[i].is_cpu() && lists.steps[i].scalar_type() == ScalarType::Float, kOp, ": ",
                item_name("steps", i), " is ", dtype_name(lists.steps[i].scalar_type()), ", expected fp32");
  BURNISH_CHECK(lists.steps[i].numel() == 1, kOp, ": ", item_name("steps", i), " has shape ",
                shape_text(lists.steps[i]), ", expected one element");
  BURNISH_CHECK(rule.master != Master::kSplit || parameter.scalar_type() != ScalarType::Float, kOp, ": ",
                item_name("masters", i), " is uint8, expected fp32, since ", item_name("params", i), " is fp32");
  if (rule.coded) {
    const Tensor& scales = lists.scales[i];
    const int64_t kinds = lists.greatest.empty() ? 2 : 3, blocks = (parameter.numel() + kStateBlock - 1) / kStateBlock;
    BURNISH_CHECK(scales.is_cpu() && scales.scalar_type() == ScalarType::Float && scales.is_contiguous(), kOp, ": ",
                  item_name("scales", i), " is ", dtype_name(scales.scalar_type()), ", expected fp32, contiguous");
    BURNISH_CHECK(scales.dim() == 2 && scales.size(0) == kinds && scales.size(1) == blocks, kOp, ": ",
                  item_name("scales", i), " has shape ", shape_text(scales), ", expected (", kinds, ", ", blocks, ")");
  }
}

AdamTensor describe(const Lists& lists, size_t i) {
  const auto at = [i](const Tensors& list) { return list.empty() ? nullptr : list[i].mutable_data_ptr(); };
  AdamTensor tensor{};
  tensor.count = lists.params[i].numel();
  tensor.index = static_cast<uint32_t>(i);
  tensor.format = format_of(lists.params[i].scalar_type());
  tensor.parameter = at(lists.params);
  tensor.gradient = lists.grads[i].const_data_ptr();
  tensor.gradient_format = format_of(lists.grads[i].scalar_type());
  tensor.moments[0] = at(lists.firsts);
  tensor.moments[1] = at(lists.seconds);
  tensor.moments[2] = at(lists.greatest);
  tensor.scales = static_cast<float*>(at(lists.scales));
  tensor.master = at(lists.masters);
  tensor.average = static_cast<float*>(at(lists.averages));
  tensor.mask = lists.masks.empty() ? nullptr : static_cast<const uint8_t*>(lists.masks[i].const_data_ptr());
  return tensor;
}

void adam_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& scales,
               const Tensors& masters, const Tensors& emas, const Tensors& masks, const Tensor& lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, bool maximize, double ema_decay,
               double max_grad_norm, const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  const Lists lists{params, grads, steps, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, scales, masters, emas, masks};
  check_lengths(lists);
  check_range("beta1", beta1, 1, "a number in [0, 1)");
  check_range("beta2", beta2, 1, "a number in [0, 1)");
  check_range("eps", eps, INFINITY, "a finite number, at least 0");
  check_range("weight_decay", weight_decay, INFINITY, "a finite number, at least 0");
  check_range("ema_decay", ema_decay, 1, "a number in [0, 1)");
  check_range("max_grad_norm", max_grad_norm, INFINITY, "a finite number, at least 0");
  BURNISH_CHECK(max_grad_norm == 0 || grad_norm.has_value(), kOp, ": max_grad_norm is ", max_grad_norm,
                ", but grad_norm is missing");
  const double rate = scalar_value(kOp, "lr", lr, 0), norm = scalar_value(kOp, "grad_norm", grad_norm, 0);
  const double scale = scalar_value(kOp, "grad_scale", grad_scale, 1),
               found = scalar_value(kOp, "found_inf", found_inf, 0);
  AdamRule rule{!decoupled && weight_decay != 0,
                false,
                Format::kFloat,
                Master::kNone,
                static_cast<float>(ema_decay),
                static_cast<float>(1 - ema_decay),
                seed.has_value(),
                static_cast<uint64_t>(seed.value_or(0))};
  if (params.empty()) return;
  set_formats(lists, rule);
  for (size_t i = 0; i < params.size(); ++i) check_item(lists, rule, i);
  if (found != 0 || (found_inf.has_value() && !std::isfinite(norm))) return;

  double factor = (maximize ? -1 : 1) / scale;
  if (max_grad_norm > 0) {
    const double clip = max_grad_norm / (norm + 1e-6);
    factor *= clip > 1 ? 1 : clip;
  }
  std::vector<AdamTensor> tensors(params.size());
  std::vector<int64_t> starts(params.size() + 1);
  float last_step = NAN;
  AdamScalars scalars{};
  for (size_t i = 0; i < params.size(); ++i) {
    float* step = steps[i].mutable_data_ptr<float>();
    *step += 1;
    if (!(*step == last_step)) {
      last_step = *step;
      scalars = adam_scalars(factor, rate, beta1, beta2, eps, weight_decay, decoupled, *step);
    }
    tensors[i] = describe(lists, i);
    tensors[i].scalars = scalars;
    starts[i + 1] = starts[i] + (tensors[i].count + kStateBlock - 1) / kStateBlock;
  }
  const Kernels& level = kernels();
  for_blocks(starts, kBlocksPerTask,
             [&](size_t i, int64_t begin, int64_t end) { level.adam_step(tensors[i], rule, begin, end); });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) { m.impl("adam_step", TORCH_BOX(&burnish::adam_step)); }
