// LAMB, see math/optimizer.h: Adam's two moments, and a step size for each tensor.
#pragma once

#include "math/optimizer.h"

namespace burnish {

struct LambScalars {
  float gradient;      // what the gradient is multiplied by
  float weight_decay;  // joins the update
  float take1;         // 1 - beta1
  float beta2, take2;  // beta2, 1 - beta2
  float first;         // 1 / (1 - beta1^step)
  float inverse;       // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr * trust ratio, which needs the update of the whole tensor: lamb_step_size
};

// All but the step size.
BURNISH_HD inline LambScalars lamb_scalars(double factor, double step, double beta1, double beta2, double eps,
                                           double weight_decay, bool bias_correction) {
  const double correction1 = bias_correction ? 1 - std::pow(beta1, step) : 1;
  const double correction2 = bias_correction ? 1 - std::pow(beta2, step) : 1;
  return {static_cast<float>(factor),
          static_cast<float>(weight_decay),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(1 / correction1),
          static_cast<float>(1 / std::sqrt(correction2)),
          static_cast<float>(eps),
          0.0f};
}

// From the sums of squares of a tensor and of its update: the ratio of their norms, 1 where one of them is 0 or NaN.
BURNISH_HD inline float lamb_step_size(double lr, double parameter_square, double update_square, bool adapt,
                                       bool trust_clip) {
  double trust = 1;
  if (adapt && parameter_square > 0 && update_square > 0) {
    trust = std::sqrt(parameter_square) / std::sqrt(update_square);
    if (trust_clip && trust > 1) trust = 1;
  }
  return static_cast<float>(lr * trust);
}

struct LambElement {
  using Scalars = LambScalars;
  static constexpr int kMoments = 2;
  BURNISH_HD static constexpr bool signed_moment(int k) { return k == 0; }

  // What the parameter moves along; the moments change in place.
  template <class V>
  BURNISH_HD static V update(const LambScalars& c, V parameter, V gradient, V* moments) {
    const V g = gradient * splat<V>(c.gradient);
    const V first = moments[0] + (g - moments[0]) * splat<V>(c.take1);
    const V second = moments[1] * splat<V>(c.beta2) + g * g * splat<V>(c.take2);
    moments[0] = first;
    moments[1] = second;
    const V update = first * splat<V>(c.first) / (square_root(second) * splat<V>(c.inverse) + splat<V>(c.eps));
    return c.weight_decay != 0.0f ? update + parameter * splat<V>(c.weight_decay) : update;
  }

  template <class V>
  BURNISH_HD static V step(const LambScalars& c, V parameter, V gradient, V* moments) {
    return parameter - update(c, parameter, gradient, moments) * splat<V>(c.step_size);
  }
};

}  // namespace burnish
