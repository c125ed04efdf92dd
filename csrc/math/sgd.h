// SGD, see math/optimizer.h: the momentum's buffer, where there is one.
#pragma once

#include "math/optimizer.h"

namespace burnish {

struct SgdScalars {
  float gradient;        // what the gradient is multiplied by
  float weight_decay;    // joins the gradient
  float momentum, take;  // momentum, 1 - dampening
  float lr;
  bool first;     // the buffer begins as the gradient
  bool nesterov;  // the variant that runs
};

BURNISH_HD inline SgdScalars sgd_scalars(double factor, double lr, double step, double momentum, double dampening,
                                         double weight_decay, bool nesterov) {
  return {static_cast<float>(factor),
          static_cast<float>(weight_decay),
          static_cast<float>(momentum),
          static_cast<float>(1 - dampening),
          static_cast<float>(lr),
          step == 1,
          nesterov};
}

template <bool kDecayed, bool kMomentum, bool kNesterov>
struct SgdElement {
  using Scalars = SgdScalars;
  static constexpr int kMoments = kMomentum ? 1 : 0;
  BURNISH_HD static constexpr bool signed_moment(int) { return true; }

  template <class V>
  BURNISH_HD static V step(const SgdScalars& c, V parameter, V gradient, [[maybe_unused]] V* moments) {
    V g = gradient * splat<V>(c.gradient);
    if constexpr (kDecayed) g = g + parameter * splat<V>(c.weight_decay);
    if constexpr (kMomentum) {
      moments[0] = c.first ? g : moments[0] * splat<V>(c.momentum) + g * splat<V>(c.take);
      g = kNesterov ? g + moments[0] * splat<V>(c.momentum) : moments[0];
    }
    return parameter - g * splat<V>(c.lr);
  }
};

// f(element) with the variant that is asked for.
template <bool kDecayed, class F>
void with_sgd_momentum(bool momentum, bool nesterov, const F& f) {
  if (!momentum) {
    f(SgdElement<kDecayed, false, false>());
  } else if (nesterov) {
    f(SgdElement<kDecayed, true, true>());
  } else {
    f(SgdElement<kDecayed, true, false>());
  }
}

template <class F>
void with_sgd_element(bool decayed, bool momentum, bool nesterov, const F& f) {
  decayed ? with_sgd_momentum<true>(momentum, nesterov, f) : with_sgd_momentum<false>(momentum, nesterov, f);
}

}  // namespace burnish
