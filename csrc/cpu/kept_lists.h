// Lists of tensors that are kept from one call of a step op to the next, which then takes them by number: to hand a
// list over is to make, look at and drop a reference to each of its tensors, and costs more than a step of small ones.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "check.h"
#include "tensor_list.h"

namespace burnish {

// A list that is kept, its tensors as they are now.
Tensors kept_list(int64_t number);

// A step op with one argument more: for each of its lists, in their order, the number of the kept list that stands for
// it, or 0.
template <auto step>
struct WithKept;

template <class... Arguments, void (*step)(Arguments...)>
struct WithKept<step> {
  static void call(Arguments... arguments, const std::vector<int64_t>& kept) {
    constexpr size_t count = (size_t{std::is_same_v<std::decay_t<Arguments>, Tensors>} + ...);
    BURNISH_CHECK(kept.size() == count, "kept has ", kept.size(), " numbers, expected ", count, ", one for each list");
    std::vector<Tensors> lists;
    lists.reserve(count);
    auto next = kept.begin();
    const auto chosen = [&]<class T>(const T& argument) -> const T& {
      if constexpr (std::is_same_v<T, Tensors>) {
        const int64_t number = *next++;
        if (number != 0) return lists.emplace_back(kept_list(number));
      }
      return argument;
    };
    std::apply(step, std::tuple<const std::decay_t<Arguments>&...>{chosen(arguments)...});
  }
};

}  // namespace burnish
