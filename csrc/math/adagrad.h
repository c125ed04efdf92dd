// Adagrad, see math/optimizer.h: the sum of the squares of the gradients.
#pragma once

#include "math/optimizer.h"

namespace burnish {

struct AdagradScalars {
  float gradient;      // what the gradient is multiplied by
  float weight_decay;  // joins the gradient
  float eps;
  float step_size;  // lr / (1 + (step - 1) * lr_decay)
};

BURNISH_HD inline AdagradScalars adagrad_scalars(double factor, double lr, double step, double lr_decay, double eps,
                                                 double weight_decay) {
  return {static_cast<float>(factor), static_cast<float>(weight_decay), static_cast<float>(eps),
          static_cast<float>(lr / (1 + (step - 1) * lr_decay))};
}

template <bool kDecayed>
struct AdagradElement {
  using Scalars = AdagradScalars;
  static constexpr int kMoments = 1;
  BURNISH_HD static constexpr bool signed_moment(int) { return false; }

  template <class V>
  BURNISH_HD static V step(const AdagradScalars& c, V parameter, V gradient, V* moments) {
    V g = gradient * splat<V>(c.gradient);
    if constexpr (kDecayed) g = g + parameter * splat<V>(c.weight_decay);
    moments[0] = moments[0] + g * g;
    const V update = g / (square_root(moments[0]) + splat<V>(c.eps));
    return parameter - update * splat<V>(c.step_size);
  }
};

// f(element) with the variant that is asked for.
template <class F>
void with_adagrad_element(bool decayed, const F& f) {
  decayed ? f(AdagradElement<true>()) : f(AdagradElement<false>());
}

}  // namespace burnish
