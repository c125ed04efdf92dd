// What the optimizers' ops share on every device: their arguments, and the checks of these, all made before anything is
// written.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>
#include <vector>

#include "optimizer.h"
#include "tensor_list.h"
#include "tensor_text.h"

namespace burnish {

// An argument, or a tensor of a list. It becomes text where an error says it: there may be thousands of tensors.
struct Name {
  const char* list;
  std::optional<size_t> item = std::nullopt;

  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    out << name.list;
    return name.item.has_value() ? out << "[" << *name.item << "]" : out;
  }
};

// On the device of `like`; and fp32, bf16 or fp16; and one fp32 or fp64 element, if any.
void check_device(const char* op, const Name& name, const TensorView& tensor, const TensorView& like);
void check_floating(const char* op, const Name& name, const TensorView& tensor, const TensorView& like);
void check_scalar(const char* op, const char* name, const std::optional<Tensor>& scalar, const TensorView& like);

// Whether the elements fill their memory, in any order of dimensions.
bool is_dense(const TensorView& tensor);

// Numbers of a step: in [0, 1); at least 0 and finite; finite.
void check_fraction(const char* op, const char* name, double value);
void check_not_negative(const char* op, const char* name, double value);
void check_finite(const char* op, const char* name, double value);

// A number that is not 0 needs another argument.
void check_needed(const char* op, const char* name, double value, const char* needed, bool there);

// One kind of moment: a tensor for each parameter, or none where it is optional.
struct MomentList {
  const char* name;
  const Tensors& tensors;
  bool is_signed;
  bool optional = false;
};

// What every optimizer's op is given, by the names of its schema.
struct StepArguments {
  const char* op;
  const Tensors &params, &grads, &steps;
  std::vector<MomentList> moments;
  const Tensors &scales, &masters, &emas, &masks;
  const Tensor& lr;
  bool maximize;
  double ema_decay, max_grad_norm;
  const std::optional<Tensor>&grad_norm, &grad_scale, &found_inf;
  const std::optional<int64_t>& seed;
};

// A step of which everything is checked; without tensors where there is nothing to step.
struct CheckedStep {
  OptimizerRule rule;
  std::vector<OptimizerTensor> tensors;
};

CheckedStep check_step(const StepArguments& given);

}  // namespace burnish
