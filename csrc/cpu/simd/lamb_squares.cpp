// lamb_squares: the update of math/lamb.h in the blocks of optimizer_block.h, which is summed and not kept.
#include "cpu/simd/optimizer_block.h"
#include "math/lamb.h"

namespace burnish::BURNISH_ISA {
namespace {

// to[i] = from[i] where the mask keeps it, else 0; they may be one.
void keep(const float* from, const uint8_t* mask, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = mask[i] != 0 ? from[i] : 0.0f;
}

}  // namespace

void lamb_squares(const OptimizerTensor& tensor, const LambScalars& scalars, const OptimizerRule& rule, int64_t begin,
                  int64_t end, double* squares) {
  Staged staged;
  squares[0] = squares[1] = 0;
  each_block(tensor, begin, end, [&](int64_t at, int64_t count) {
    const float* parameter = take_parameter(tensor, rule, at, count, staged.parameter);
    const float* const gradient = take(tensor.gradient, tensor.gradient_format, at, count, staged.gradient);
    float* moments[kMostMoments] = {};
    take_moments<LambElement>(tensor, rule, at, count, staged, moments);
    float* const update = staged.gradient;
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      const int64_t left = count - i;
      Vec held[LambElement::kMoments] = {load(moments[0] + i, left), load(moments[1] + i, left)};
      store(update + i, LambElement::update(scalars, load(parameter + i, left), load(gradient + i, left), held), left);
    }
    if (tensor.mask != nullptr) {
      keep(update, tensor.mask + at, count, update);
      keep(parameter, tensor.mask + at, count, staged.parameter);
      parameter = staged.parameter;
    }
    squares[0] += sum_squares(parameter, Format::kFloat, count);
    squares[1] += sum_squares(update, Format::kFloat, count);
  });
}

}  // namespace burnish::BURNISH_ISA
