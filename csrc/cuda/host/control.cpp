// What Python may ask of the emulated device.
#include <torch/csrc/stable/library.h>

#include "cuda/host/machine.h"

namespace {

int64_t emulation_seed(int64_t seed) {
  burnish::host::set_seed(static_cast<uint64_t>(seed));
  return seed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(burnish, CompositeExplicitAutograd, m) {
  m.impl("emulation_seed", TORCH_BOX(&emulation_seed));
}
