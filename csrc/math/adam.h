// One element's step of Adam and AdamW, written once over a value type V: float here and on a GPU, a SIMD vector in
// cpu/simd/. Every operation rounds once, in this order, so all of them give the bits of the reference in
// python/burnish/ops/adam_step.py. Beside what activation.h asks of V: square_root, and maximum, which keeps NaN.
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

// What a step is to one tensor. Each is computed in double and rounded once.
struct AdamScalars {
  float gradient;      // what the gradient is multiplied by: unscaled, clipped, and negative to maximize
  float weight_decay;  // joins the gradient; 0 where it is decoupled
  float kept;          // 1 - lr * weight_decay where it is decoupled, else 1
  float take1;         // 1 - beta1
  float beta2, take2;  // beta2, 1 - beta2
  float inverse;       // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr / (1 - beta1^step)
};

inline AdamScalars adam_scalars(double factor, double lr, double beta1, double beta2, double eps, double weight_decay,
                                bool decoupled, double step) {
  const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
  const double kept = decoupled && weight_decay != 0 ? 1 - lr * weight_decay : 1;
  return {static_cast<float>(factor),
          static_cast<float>(decoupled ? 0 : weight_decay),
          static_cast<float>(kept),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(1 / std::sqrt(correction2)),
          static_cast<float>(eps),
          static_cast<float>(lr / correction1)};
}

// The parameter after a step on `gradient`; the moments change in place. `largest` is the greatest second moment so
// far, of amsgrad, or null.
template <bool kCoupled, class V>
BURNISH_HD inline V adam_element(const AdamScalars& c, V parameter, V gradient, V& first, V& second, V* largest) {
  V g = gradient * splat<V>(c.gradient);
  if (kCoupled) g = g + parameter * splat<V>(c.weight_decay);
  first = first + (g - first) * splat<V>(c.take1);
  second = second * splat<V>(c.beta2) + g * g * splat<V>(c.take2);
  if (largest != nullptr) *largest = maximum(*largest, second);
  const V spread = largest != nullptr ? *largest : second;
  const V update = first / (square_root(spread) * splat<V>(c.inverse) + splat<V>(c.eps));
  return parameter * splat<V>(c.kept) - update * splat<V>(c.step_size);
}

}  // namespace burnish
