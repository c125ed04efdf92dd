// One element's step of an optimizer is a type in math/<optimizer>.h, written once over a value type V: float here and
// on a GPU, a SIMD vector in cpu/simd/. Every operation rounds once, in the order written, so all of them give the bits
// of the reference in python/burnish/ops/<optimizer>_step.py:
//
//   using Scalars = ...;                        what a step is to one tensor, each computed in double and rounded once
//   static constexpr int kMoments = ...;        how many moments it keeps, those of this variant alone
//   static constexpr bool signed_moment(int);   whether a moment may be negative, which its 8-bit codes ask
//   template <class V> static V step(const Scalars&, V parameter, V gradient, V* moments);
//
// step gives the new parameter and changes the moments in place; it scales the gradient itself. It may be two halves,
// which a loop each can run: advance(scalars, parameter, gradient, moments) changes the moments, and finish(scalars,
// parameter, first, root) gives the new parameter from the first moment and the square root of the last. Beside what
// activation.h asks of V: square_root, and maximum, which keeps NaN.
#pragma once

#include "math/activation.h"

namespace burnish {

BURNISH_HD inline float square_root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}
BURNISH_HD inline float maximum(float a, float b) { return a != a || a > b ? a : b; }

// What the gradients are multiplied by: unscaled, clipped to a norm where max_grad_norm is above 0, and negative to
// maximize.
BURNISH_HD inline double gradient_factor(bool maximize, double grad_scale, double max_grad_norm, double grad_norm) {
  const double factor = (maximize ? -1 : 1) / grad_scale;
  if (!(max_grad_norm > 0)) return factor;
  const double clip = max_grad_norm / (grad_norm + 1e-6);
  return factor * (clip > 1 ? 1 : clip);
}

}  // namespace burnish
