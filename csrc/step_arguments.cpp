#include "step_arguments.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace burnish {

void check_device(const char* op, const Name& name, const TensorView& tensor, const TensorView& like) {
  BURNISH_CHECK(tensor.on_device_of(like), op, ": ", name,
                " is on another device than the first tensor, expected all on one");
}

void check_floating(const char* op, const Name& name, const TensorView& tensor, const TensorView& like) {
  check_device(op, name, tensor, like);
  BURNISH_CHECK(is_floating(tensor.scalar_type()), op, ": ", name, " is ", dtype_name(tensor.scalar_type()),
                ", expected fp32, bf16 or fp16");
}

void check_scalar(const char* op, const char* name, const std::optional<Tensor>& scalar, const TensorView& like) {
  if (!scalar.has_value()) return;
  check_device(op, {name}, *scalar, like);
  const ScalarType type = scalar->scalar_type();
  BURNISH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": ", name, " is ", dtype_name(type),
                ", expected fp32 or fp64");
  BURNISH_CHECK(scalar->numel() == 1, op, ": ", name, " has shape ", shape_text(*scalar), ", expected one element");
}

void check_fraction(const char* op, const char* name, double value) {
  BURNISH_CHECK(value >= 0 && value < 1, op, ": ", name, " is ", value, ", expected a number in [0, 1)");
}

void check_not_negative(const char* op, const char* name, double value) {
  BURNISH_CHECK(value >= 0 && value < INFINITY, op, ": ", name, " is ", value,
                ", expected a finite number, at least 0");
}

void check_finite(const char* op, const char* name, double value) {
  BURNISH_CHECK(std::isfinite(value), op, ": ", name, " is ", value, ", expected a finite number");
}

void check_needed(const char* op, const char* name, double value, const char* needed, bool there) {
  BURNISH_CHECK(value == 0 || there, op, ": ", name, " is ", value, ", but ", needed, " is missing");
}

bool is_dense(const TensorView& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t dim : order) {
    if (sizes[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

namespace {

void check_list(const char* op, const char* name, const Tensors& list, size_t count, bool optional) {
  BURNISH_CHECK(list.size() == count || (optional && list.empty()), op, ": ", name, " has ", list.size(),
                " tensors, expected ", count, ", one for each of params", optional ? ", or none" : "");
}

void check_lengths(const StepArguments& given) {
  const size_t count = given.params.size();
  check_list(given.op, "grads", given.grads, count, false);
  check_list(given.op, "steps", given.steps, count, false);
  for (const MomentList& moment : given.moments) {
    check_list(given.op, moment.name, moment.tensors, count, moment.optional);
  }
  check_list(given.op, "scales", given.scales, count, true);
  check_list(given.op, "masters", given.masters, count, true);
  check_list(given.op, "emas", given.emas, count, true);
  check_list(given.op, "masks", given.masks, count, true);
}

// Shape and strides of `parameter`, whose elements fill their memory.
void check_alike(const char* op, const char* name, size_t item, const Tensors& list, const TensorView& parameter) {
  if (list.empty()) return;
  const TensorView& tensor = list[item];
  check_device(op, Name{name, item}, tensor, parameter);
  BURNISH_CHECK(tensor.has_shape_of(parameter), op, ": ", Name{name, item}, " has shape ", shape_text(tensor),
                ", expected ", shape_text(parameter), ", that of ", Name{"params", item});
  if (tensor.is_contiguous() && parameter.is_contiguous()) return;
  const auto sizes = parameter.sizes(), wanted = parameter.strides(), strides = tensor.strides();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    BURNISH_CHECK(sizes[dim] <= 1 || wanted[dim] == strides[dim] || parameter.numel() == 0, op, ": ", Name{name, item},
                  " has other strides than ", Name{"params", item}, ", expected both contiguous or in the same order");
  }
}

// The dtype that a list has throughout, one of `allowed`.
ScalarType common_dtype(const char* op, const char* name, const Tensors& list,
                        std::initializer_list<ScalarType> allowed, const std::string& expected) {
  const ScalarType type = list.front().scalar_type();
  for (size_t i = 0; i < list.size(); ++i) {
    const ScalarType own = list[i].scalar_type();
    BURNISH_CHECK(std::find(allowed.begin(), allowed.end(), own) != allowed.end(), op, ": ", Name{name, i}, " is ",
                  dtype_name(own), ", expected ", expected);
    BURNISH_CHECK(own == type, op, ": ", Name{name, i}, " is ", dtype_name(own), ", expected ", dtype_name(type),
                  " as the others are");
  }
  return type;
}

// One dtype for all moments, and scales if they are codes.
void set_moment_formats(const StepArguments& given, OptimizerRule& rule) {
  const MomentList* first = nullptr;
  ScalarType type = ScalarType::Float;
  std::string since = ", since there are no moments";
  for (const MomentList& moment : given.moments) {
    if (moment.tensors.empty()) continue;
    const ScalarType codes = moment.is_signed ? ScalarType::Char : ScalarType::Byte;
    if (first == nullptr) {
      first = &moment;
      type = common_dtype(given.op, moment.name, moment.tensors, {ScalarType::Float, ScalarType::BFloat16, codes},
                          "fp32, bf16 or " + dtype_name(codes));
      rule.coded = type == codes;
      rule.moments = type == ScalarType::BFloat16 ? Format::kBf16 : Format::kFloat;
      since = std::string(", since ") + moment.name + " are " + dtype_name(type);
    } else {
      const ScalarType wanted = rule.coded ? codes : type;
      common_dtype(given.op, moment.name, moment.tensors, {wanted}, dtype_name(wanted) + since);
    }
  }
  BURNISH_CHECK(given.scales.empty() != rule.coded, given.op, ": scales has ", given.scales.size(),
                " tensors, expected ", rule.coded ? given.params.size() : 0, since);
}

// What the dtypes of the lists ask for.
void set_formats(const StepArguments& given, OptimizerRule& rule) {
  set_moment_formats(given, rule);
  if (!given.emas.empty()) common_dtype(given.op, "emas", given.emas, {ScalarType::Float}, "fp32");
  if (!given.masks.empty()) common_dtype(given.op, "masks", given.masks, {ScalarType::Bool}, "bool");
  if (!given.masters.empty()) {
    const ScalarType master =
        common_dtype(given.op, "masters", given.masters, {ScalarType::Float, ScalarType::Byte}, "fp32 or uint8");
    rule.master = master == ScalarType::Float ? Master::kFloat : Master::kSplit;
  }
}

void check_scales(const StepArguments& given, size_t i) {
  const TensorView& scales = given.scales[i];
  const int64_t kinds = std::count_if(given.moments.begin(), given.moments.end(),
                                      [](const MomentList& moment) { return !moment.tensors.empty(); });
  const int64_t blocks = (given.params[i].numel() + kStateBlock - 1) / kStateBlock;
  check_device(given.op, Name{"scales", i}, scales, given.params[i]);
  BURNISH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous(), given.op, ": ", Name{"scales", i},
                " is ", dtype_name(scales.scalar_type()), ", expected fp32, contiguous");
  BURNISH_CHECK(scales.dim() == 2 && scales.size(0) == kinds && scales.size(1) == blocks, given.op, ": ",
                Name{"scales", i}, " has shape ", shape_text(scales), ", expected (", kinds, ", ", blocks, ")");
}

void check_item(const StepArguments& given, const OptimizerRule& rule, size_t i) {
  const char* const op = given.op;
  const TensorView &parameter = given.params[i], &step = given.steps[i];
  check_floating(op, Name{"params", i}, parameter, given.params.front());
  BURNISH_CHECK(is_dense(parameter), op, ": ", Name{"params", i},
                " has gaps or overlaps in memory, expected it contiguous, in any order of dimensions");
  check_floating(op, Name{"grads", i}, given.grads[i], parameter);
  check_alike(op, "grads", i, given.grads, parameter);
  for (const MomentList& moment : given.moments) check_alike(op, moment.name, i, moment.tensors, parameter);
  check_alike(op, "masters", i, given.masters, parameter);
  check_alike(op, "emas", i, given.emas, parameter);
  check_alike(op, "masks", i, given.masks, parameter);
  check_device(op, Name{"steps", i}, step, parameter);
  BURNISH_CHECK(step.scalar_type() == ScalarType::Float, op, ": ", Name{"steps", i}, " is ",
                dtype_name(step.scalar_type()), ", expected fp32");
  BURNISH_CHECK(step.numel() == 1, op, ": ", Name{"steps", i}, " has shape ", shape_text(step),
                ", expected one element");
  BURNISH_CHECK(rule.master != Master::kSplit || parameter.scalar_type() != ScalarType::Float, op, ": ",
                Name{"masters", i}, " is uint8, expected fp32, since ", Name{"params", i}, " is fp32");
  if (rule.coded) check_scales(given, i);
}

OptimizerTensor describe(const StepArguments& given, size_t i) {
  const auto at = [i](const Tensors& list) { return list.empty() ? nullptr : list[i].mutable_data_ptr(); };
  OptimizerTensor tensor{};
  tensor.count = given.params[i].numel();
  tensor.index = static_cast<uint32_t>(i);
  tensor.format = format_of(given.params[i].scalar_type());
  tensor.parameter = at(given.params);
  tensor.gradient = given.grads[i].const_data_ptr();
  tensor.gradient_format = format_of(given.grads[i].scalar_type());
  int kinds = 0;
  for (const MomentList& moment : given.moments) {
    if (!moment.tensors.empty()) tensor.moments[kinds++] = at(moment.tensors);
  }
  tensor.scales = static_cast<float*>(at(given.scales));
  tensor.master = at(given.masters);
  tensor.average = static_cast<float*>(at(given.emas));
  tensor.mask = given.masks.empty() ? nullptr : static_cast<const uint8_t*>(given.masks[i].const_data_ptr());
  return tensor;
}

}  // namespace

CheckedStep check_step(const StepArguments& given) {
  const char* const op = given.op;
  check_lengths(given);
  check_fraction(op, "ema_decay", given.ema_decay);
  check_not_negative(op, "max_grad_norm", given.max_grad_norm);
  check_needed(op, "max_grad_norm", given.max_grad_norm, "grad_norm", given.grad_norm.has_value());
  const size_t count = given.params.size();
  const TensorView like = count == 0 ? TensorView(given.lr) : given.params.front();
  check_scalar(op, "lr", given.lr, like);
  check_scalar(op, "grad_norm", given.grad_norm, like);
  check_scalar(op, "grad_scale", given.grad_scale, like);
  check_scalar(op, "found_inf", given.found_inf, like);
  CheckedStep step{};
  if (count == 0) return step;
  step.rule.average_kept = static_cast<float>(given.ema_decay);
  step.rule.average_taken = static_cast<float>(1 - given.ema_decay);
  step.rule.random = given.seed.has_value();
  step.rule.seed = static_cast<uint64_t>(given.seed.value_or(0));
  set_formats(given, step.rule);
  for (size_t i = 0; i < count; ++i) check_item(given, step.rule, i);
  step.tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) step.tensors.push_back(describe(given, i));
  return step;
}

}  // namespace burnish
