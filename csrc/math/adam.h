// Adam and AdamW, see math/optimizer.h: the first moment, the second, and of amsgrad the greatest second so far.
#pragma once

#include "math/optimizer.h"

namespace burnish {

struct AdamScalars {
  float gradient;      // what the gradient is multiplied by
  float weight_decay;  // joins the gradient; 0 where it is decoupled
  float kept;          // 1 - lr * weight_decay where it is decoupled, else 1
  float take1;         // 1 - beta1
  float beta2, take2;  // beta2, 1 - beta2
  float inverse;       // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr / (1 - beta1^step)
};

BURNISH_HD inline AdamScalars adam_scalars(double factor, double lr, double step, double beta1, double beta2,
                                           double eps, double weight_decay, bool decoupled) {
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

// kCoupled: weight decay joins the gradient.
template <bool kCoupled, bool kGreatest>
struct AdamElement {
  using Scalars = AdamScalars;
  static constexpr int kMoments = kGreatest ? 3 : 2;
  BURNISH_HD static constexpr bool signed_moment(int k) { return k == 0; }

  template <class V>
  BURNISH_HD static void advance(const AdamScalars& c, V parameter, V gradient, V* moments) {
    V g = gradient * splat<V>(c.gradient);
    if constexpr (kCoupled) g = g + parameter * splat<V>(c.weight_decay);
    moments[0] = moments[0] + (g - moments[0]) * splat<V>(c.take1);
    moments[1] = moments[1] * splat<V>(c.beta2) + g * g * splat<V>(c.take2);
    if constexpr (kGreatest) moments[2] = maximum(moments[2], moments[1]);
  }

  template <class V>
  BURNISH_HD static V finish(const AdamScalars& c, V parameter, V first, V root) {
    const V update = first / (root * splat<V>(c.inverse) + splat<V>(c.eps));
    return parameter * splat<V>(c.kept) - update * splat<V>(c.step_size);
  }

  template <class V>
  BURNISH_HD static V step(const AdamScalars& c, V parameter, V gradient, V* moments) {
    advance(c, parameter, gradient, moments);
    return finish(c, parameter, moments[0], square_root(moments[kMoments - 1]));
  }
};

// f(element) with the variant that is asked for.
template <class F>
void with_adam_element(bool coupled, bool greatest, const F& f) {
  if (coupled) {
    greatest ? f(AdamElement<true, true>()) : f(AdamElement<true, false>());
  } else {
    greatest ? f(AdamElement<false, true>()) : f(AdamElement<false, false>());
  }
}

}  // namespace burnish
