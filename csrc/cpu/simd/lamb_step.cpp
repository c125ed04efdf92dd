// lamb_step: the element of math/lamb.h in the blocks of optimizer_block.h.
#include "cpu/simd/optimizer_block.h"
#include "math/lamb.h"

namespace burnish::BURNISH_ISA {

void lamb_step(const OptimizerTensor& tensor, const LambScalars& scalars, const OptimizerRule& rule, int64_t begin,
               int64_t end) {
  step_blocks<LambElement>(tensor, scalars, rule, begin, end);
}

}  // namespace burnish::BURNISH_ISA
