// Lion, see math/optimizer.h: one moment.
#pragma once

#include "math/optimizer.h"

namespace burnish {

struct LionScalars {
  float gradient;      // what the gradient is multiplied by
  float kept;          // 1 - lr * weight_decay: of the parameter
  float beta1, take1;  // beta1, 1 - beta1: of the update
  float beta2, take2;  // of the moment
  float lr;
};

BURNISH_HD inline LionScalars lion_scalars(double factor, double lr, double beta1, double beta2, double weight_decay) {
  return {static_cast<float>(factor), static_cast<float>(weight_decay != 0 ? 1 - lr * weight_decay : 1),
          static_cast<float>(beta1),  static_cast<float>(1 - beta1),
          static_cast<float>(beta2),  static_cast<float>(1 - beta2),
          static_cast<float>(lr)};
}

struct LionElement {
  using Scalars = LionScalars;
  static constexpr int kMoments = 1;
  BURNISH_HD static constexpr bool signed_moment(int) { return true; }

  // The sign of NaN is 0, as torch.sign has it.
  template <class V>
  BURNISH_HD static V step(const LionScalars& c, V parameter, V gradient, V* moments) {
    const V g = gradient * splat<V>(c.gradient), zero = splat<V>(0.0f);
    const V direction = moments[0] * splat<V>(c.beta1) + g * splat<V>(c.take1);
    moments[0] = moments[0] * splat<V>(c.beta2) + g * splat<V>(c.take2);
    const V down = select(less(direction, zero), splat<V>(-1.0f), zero);
    const V sign = select(less(zero, direction), splat<V>(1.0f), down);
    return parameter * splat<V>(c.kept) - sign * splat<V>(c.lr);
  }
};

}  // namespace burnish
