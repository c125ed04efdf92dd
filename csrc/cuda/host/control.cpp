// What Python may ask of the emulated device.
#include <torch/csrc/stable/library.h>

#include "cuda/host/machine.h"

STABLE_TORCH_LIBRARY_IMPL(burnish, CompositeExplicitAutograd, m) {
  m.impl("emulation_seed", TORCH_BOX(&burnish::host::set_seed));
  m.impl("emulation_count", TORCH_BOX(&burnish::host::set_counting));
  m.impl("emulation_counters", TORCH_BOX(&burnish::host::take_counters));
}
