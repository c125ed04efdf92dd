// adam_step: the elements of math/adam.h in the blocks of optimizer_block.h.
#include "cpu/simd/optimizer_block.h"
#include "math/adam.h"

namespace burnish::BURNISH_ISA {

void adam_step(const OptimizerTensor& tensor, const AdamScalars& scalars, const OptimizerRule& rule, int64_t begin,
               int64_t end) {
  with_adam_element(scalars.weight_decay != 0, tensor.moments[2] != nullptr,
                    [&](auto element) { step_blocks<decltype(element)>(tensor, scalars, rule, begin, end); });
}

}  // namespace burnish::BURNISH_ISA
