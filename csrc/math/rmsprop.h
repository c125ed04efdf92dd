// RMSprop, see math/optimizer.h: the mean square, then what the variant has of the mean gradient and the momentum.
#pragma once

#include "math/optimizer.h"

namespace burnish {

struct RmspropScalars {
  float gradient;      // what the gradient is multiplied by
  float weight_decay;  // joins the gradient
  float alpha, take;   // alpha, 1 - alpha
  float eps;
  float momentum;
  float lr;
  bool centered, buffered;  // which variant: what its moments are
};

BURNISH_HD inline RmspropScalars rmsprop_scalars(double factor, double lr, double alpha, double eps,
                                                 double weight_decay, double momentum, bool centered, bool buffered) {
  return {static_cast<float>(factor),
          static_cast<float>(weight_decay),
          static_cast<float>(alpha),
          static_cast<float>(1 - alpha),
          static_cast<float>(eps),
          static_cast<float>(momentum),
          static_cast<float>(lr),
          centered,
          buffered};
}

template <bool kCentered, bool kBuffered>
struct RmspropElement {
  using Scalars = RmspropScalars;
  static constexpr int kMoments = 1 + kCentered + kBuffered;
  BURNISH_HD static constexpr bool signed_moment(int k) { return k > 0; }

  // Rounding may leave the mean square below the squared mean: then their difference counts as 0.
  template <class V>
  BURNISH_HD static V step(const RmspropScalars& c, V parameter, V gradient, V* moments) {
    V g = gradient * splat<V>(c.gradient);
    if (c.weight_decay != 0.0f) g = g + parameter * splat<V>(c.weight_decay);
    const V square = moments[0] * splat<V>(c.alpha) + g * g * splat<V>(c.take);
    moments[0] = square;
    V spread = square;
    if constexpr (kCentered) {
      const V mean = moments[1] + (g - moments[1]) * splat<V>(c.take);
      moments[1] = mean;
      spread = maximum(square - mean * mean, splat<V>(0.0f));
    }
    V update = g / (square_root(spread) + splat<V>(c.eps));
    if constexpr (kBuffered) moments[kMoments - 1] = update = moments[kMoments - 1] * splat<V>(c.momentum) + update;
    return parameter - update * splat<V>(c.lr);
  }
};

// f(element) with the variant that is asked for.
template <class F>
void with_rmsprop_element(bool centered, bool buffered, const F& f) {
  if (centered) {
    buffered ? f(RmspropElement<true, true>()) : f(RmspropElement<true, false>());
  } else {
    buffered ? f(RmspropElement<false, true>()) : f(RmspropElement<false, false>());
  }
}

}  // namespace burnish
