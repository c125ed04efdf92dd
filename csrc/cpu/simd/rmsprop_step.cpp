// rmsprop_step: the element of math/rmsprop.h in the blocks of optimizer_block.h.
#include "cpu/simd/optimizer_block.h"
#include "math/rmsprop.h"

namespace burnish::BURNISH_ISA {

void rmsprop_step(const OptimizerTensor& tensor, const RmspropScalars& scalars, const OptimizerRule& rule,
                  int64_t begin, int64_t end) {
  with_rmsprop_element(scalars.centered, scalars.buffered,
                       [&](auto element) { step_blocks<decltype(element)>(tensor, scalars, rule, begin, end); });
}

}  // namespace burnish::BURNISH_ISA
