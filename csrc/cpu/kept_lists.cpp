#include "cpu/kept_lists.h"

#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>

namespace burnish {
namespace {

// Those that nobody dropped are left to the end of the process: a tensor may not outlive Python.
struct KeptLists {
  std::mutex mutex;
  std::map<int64_t, Tensors> of;
  int64_t last = 0;
};

KeptLists& kept_lists() {
  static auto* const lists = new KeptLists;
  return *lists;
}

int64_t keep_tensors(const Tensors& tensors) {
  KeptLists& lists = kept_lists();
  const std::lock_guard<std::mutex> lock(lists.mutex);
  lists.of.emplace(++lists.last, tensors);
  return lists.last;
}

void drop_tensors(int64_t number) {
  KeptLists& lists = kept_lists();
  std::unique_lock<std::mutex> lock(lists.mutex);
  const auto dropped = lists.of.extract(number);
  lock.unlock();  // before its tensors go, who may be the last owners of another list
}

}  // namespace

Tensors kept_list(int64_t number) {
  KeptLists& lists = kept_lists();
  const std::lock_guard<std::mutex> lock(lists.mutex);
  const auto found = lists.of.find(number);
  BURNISH_CHECK(found != lists.of.end(), "kept is ", number, ", expected the number of a list that is kept, or 0");
  return found->second.again();
}

}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CompositeExplicitAutograd, m) {
  m.impl("keep_tensors", TORCH_BOX(&burnish::keep_tensors));
  m.impl("drop_tensors", TORCH_BOX(&burnish::drop_tensors));
}
