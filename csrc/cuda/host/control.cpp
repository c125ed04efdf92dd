// What Python may ask of the emulated device.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/host/machine.h"

namespace {

int64_t emulation_seed(int64_t seed) {
  burnish::host::set_seed(static_cast<uint64_t>(seed));
  return seed;
}

bool emulation_count(bool on) {
  burnish::host::set_counting(on);
  return on;
}

std::string emulation_counters() { return burnish::host::take_counters(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(burnish, CompositeExplicitAutograd, m) {
  m.impl("emulation_seed", TORCH_BOX(&emulation_seed));
  m.impl("emulation_count", TORCH_BOX(&emulation_count));
  m.impl("emulation_counters", TORCH_BOX(&emulation_counters));
}
