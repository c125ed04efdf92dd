// What the optimizers' ops share: checks of their lists, and one loop over the elements of all tensors together.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/parallel.h"

namespace burnish {

using Tensors = std::vector<Tensor>;

inline std::string item_name(const char* list, size_t item) {
  return std::string(list) + "[" + std::to_string(item) + "]";
}

// A scalar of the step, as fp32 or fp64 tensors hold it; `fallback` where there is none.
double scalar_value(const char* op, const char* name, const std::optional<Tensor>& scalar, double fallback);

// One tensor an item of `params`, of one of two dtypes, on the CPU.
void check_list(const char* op, const char* name, const Tensors& list, size_t count, bool optional);

// Shape and strides of `parameter`, whose elements fill their memory.
void check_alike(const char* op, const char* name, size_t item, const Tensor& tensor, const Tensor& parameter);
void check_dense(const char* op, const char* name, size_t item, const Tensor& parameter);

// f(item, begin, end) on shares of the blocks of all items together: item i has starts[i + 1] - starts[i] of them.
template <class F>
void for_blocks(const std::vector<int64_t>& starts, int64_t grain, const F& f) {
  parallel_for(0, starts.back(), grain, [&](int64_t begin, int64_t end) {
    auto next = std::upper_bound(starts.begin(), starts.end(), begin);  // past the item that holds `begin`
    while (begin < end) {
      const int64_t last = std::min(end, *next);
      const int64_t start = *(next - 1);
      f(static_cast<size_t>(next - 1 - starts.begin()), begin - start, last - start);
      begin = last;
      while (next != starts.end() && *next <= begin) ++next;
    }
  });
}

}  // namespace burnish
