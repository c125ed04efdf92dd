#include "cpu/held_steps.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>
#include <vector>

namespace burnish {
namespace {

thread_local std::optional<std::vector<std::function<void()>>> held;

void hold_steps() { held.emplace(); }

// Does the steps that are held, or drops them.
void release_steps(bool done) {
  const auto steps = std::exchange(held, std::nullopt);
  if (!done || !steps.has_value()) return;
  for (const auto& step : *steps) step();
}

}  // namespace

void do_step(std::function<void()> step) {
  if (held.has_value()) {
    held->push_back(std::move(step));
  } else {
    step();
  }
}

}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CompositeExplicitAutograd, m) {
  m.impl("hold_steps", TORCH_BOX(&burnish::hold_steps));
  m.impl("release_steps", TORCH_BOX(&burnish::release_steps));
}
