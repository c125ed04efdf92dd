// lion_step: the element of math/lion.h in the blocks of optimizer_block.h.
#include "cpu/simd/optimizer_block.h"
#include "math/lion.h"

namespace burnish::BURNISH_ISA {

void lion_step(const OptimizerTensor& tensor, const LionScalars& scalars, const OptimizerRule& rule, int64_t begin,
               int64_t end) {
  step_blocks<LionElement>(tensor, scalars, rule, begin, end);
}

}  // namespace burnish::BURNISH_ISA
