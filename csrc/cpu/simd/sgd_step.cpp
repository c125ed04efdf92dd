// sgd_step: the elements of math/sgd.h in the blocks of optimizer_block.h.
#include "cpu/simd/optimizer_block.h"
#include "math/sgd.h"

namespace burnish::BURNISH_ISA {

void sgd_step(const OptimizerTensor& tensor, const SgdScalars& scalars, const OptimizerRule& rule, int64_t begin,
              int64_t end) {
  with_sgd_element(scalars.weight_decay != 0, tensor.moments[0] != nullptr, scalars.nesterov,
                   [&](auto element) { step_blocks<decltype(element)>(tensor, scalars, rule, begin, end); });
}

}  // namespace burnish::BURNISH_ISA
