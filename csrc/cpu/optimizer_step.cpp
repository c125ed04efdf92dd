#include "cpu/optimizer_step.h"

#include <numeric>

namespace burnish {

double scalar_value(const char* op, const char* name, const std::optional<Tensor>& scalar, double fallback) {
  if (!scalar.has_value()) return fallback;
  check_cpu(op, name, *scalar);
  const ScalarType type = scalar->scalar_type();
  BURNISH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": ", name, " is ", dtype_name(type),
                ", expected fp32 or fp64");
  BURNISH_CHECK(scalar->numel() == 1, op, ": ", name, " has shape ", shape_text(*scalar), ", expected one element");
  return type == ScalarType::Double ? *scalar->const_data_ptr<double>() : *scalar->const_data_ptr<float>();
}

void check_list(const char* op, const char* name, const Tensors& list, size_t count, bool optional) {
  BURNISH_CHECK(list.size() == count || (optional && list.empty()), op, ": ", name, " has ", list.size(),
                " tensors, expected ", count, ", one for each of params", optional ? ", or none" : "");
}

void check_dense(const char* op, const char* name, size_t item, const Tensor& parameter) {
  if (parameter.is_contiguous()) return;
  const auto sizes = parameter.sizes(), strides = parameter.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t dim : order) {
    if (sizes[dim] == 1) continue;
    BURNISH_CHECK(strides[dim] == expected, op, ": ", item_name(name, item),
                  " has gaps or overlaps in memory, expected it contiguous, in any order of dimensions");
    expected *= sizes[dim];
  }
}

void check_alike(const char* op, const char* name, size_t item, const Tensor& tensor, const Tensor& parameter) {
  const auto sizes = parameter.sizes(), own = tensor.sizes();
  BURNISH_CHECK(std::equal(sizes.begin(), sizes.end(), own.begin(), own.end()), op, ": ", item_name(name, item),
                " has shape ", shape_text(tensor), ", expected ", shape_text(parameter), ", that of ",
                item_name("params", item));
  const auto wanted = parameter.strides(), given = tensor.strides();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    BURNISH_CHECK(sizes[dim] <= 1 || wanted[dim] == given[dim] || parameter.numel() == 0, op, ": ",
                  item_name(name, item), " has other strides than ", item_name("params", item),
                  ", expected both contiguous or in the same order");
  }
}

}  // namespace burnish
