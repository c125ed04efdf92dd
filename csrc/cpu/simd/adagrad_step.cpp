// adagrad_step: the elements of math/adagrad.h in the blocks of optimizer_block.h.
#include "cpu/simd/optimizer_block.h"
#include "math/adagrad.h"

namespace burnish::BURNISH_ISA {

void adagrad_step(const OptimizerTensor& tensor, const AdagradScalars& scalars, const OptimizerRule& rule,
                  int64_t begin, int64_t end) {
  with_adagrad_element(scalars.weight_decay != 0,
                       [&](auto element) { step_blocks<decltype(element)>(tensor, scalars, rule, begin, end); });
}

}  // namespace burnish::BURNISH_ISA
