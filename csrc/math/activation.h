// Epilogue activations and their slopes, written once over a value type V: float here and on a GPU, a SIMD vector in
// cpu/simd/vec.h. Every operation rounds once and every fused multiply-add is spelled, so all of them give the same
// bits. V has + - * /, and the functions of the first block; select(less(a, b), x, y) keeps NaN in y's place.
#pragma once

#include "math/base.h"

namespace burnish {

BURNISH_HD inline float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
BURNISH_HD inline float absolute(float a) { return bits_float(float_bits(a) & 0x7fffffffu); }
BURNISH_HD inline bool less(float a, float b) { return a < b; }
BURNISH_HD inline float select(bool condition, float a, float b) { return condition ? a : b; }
// 2^n from n + 1.5 * 2^23, whose low mantissa bits are the integer n; n in [-126, 127].
BURNISH_HD inline float power_of_two(float shifted) { return bits_float((float_bits(shifted) << 23) + 0x3f800000u); }
template <class V>
BURNISH_HD V splat(float a) {
  return V(a);
}

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
constexpr int kActivations = 5;

// exp(x) for x <= 0, within 1 ulp; 0 below -87.3, where the result would be subnormal. Cody and Waite's reduction, a
// degree 6 minimax polynomial (Cephes expf).
template <class V>
BURNISH_HD V exp_negative(V x) {
  const V floor = splat<V>(-87.3f);
  const auto tiny = less(x, floor);
  const V inside = select(tiny, splat<V>(0.0f), x);
  const V rounder = splat<V>(12582912.0f);  // 1.5 * 2^23
  const V shifted = fma(inside, splat<V>(1.44269504088896341f), rounder);
  const V n = shifted - rounder;
  V r = fma(n, splat<V>(-0.693145751953125f), inside);
  r = fma(n, splat<V>(-1.42860682030941723212e-6f), r);
  V p = fma(r, splat<V>(1.9875691500e-4f), splat<V>(1.3981999507e-3f));
  p = fma(p, r, splat<V>(8.3334519073e-3f));
  p = fma(p, r, splat<V>(4.1665795894e-2f));
  p = fma(p, r, splat<V>(1.6666665459e-1f));
  p = fma(p, r, splat<V>(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat<V>(1.0f);
  return select(tiny, splat<V>(0.0f), p * power_of_two(shifted));
}

// sigmoid(x) and sigmoid(-x), each without cancellation.
template <class V>
struct SigmoidPair {
  V at;
  V mirrored;
};

template <class V>
BURNISH_HD SigmoidPair<V> sigmoid_pair(V x) {
  const V e = exp_negative(splat<V>(0.0f) - absolute(x));
  const V sum = splat<V>(1.0f) + e;
  const V large = splat<V>(1.0f) / sum;
  const V small = e / sum;
  const auto negative = less(x, splat<V>(0.0f));
  return {select(negative, small, large), select(negative, large, small)};
}

template <class V>
BURNISH_HD V sigmoid(V x) {
  const V e = exp_negative(splat<V>(0.0f) - absolute(x));
  const V numerator = select(less(x, splat<V>(0.0f)), e, splat<V>(1.0f));
  return numerator / (splat<V>(1.0f) + e);
}

template <class V>
BURNISH_HD V relu(V z) {
  return select(less(z, splat<V>(0.0f)), splat<V>(0.0f), z);
}

// 1 at NaN, as torch's relu lets the gradient through there.
template <class V>
BURNISH_HD V relu_slope(V z) {
  const auto positive = less(splat<V>(0.0f), z);
  const auto otherwise = select(less(z, splat<V>(1.0f)), splat<V>(0.0f), splat<V>(1.0f));
  return select(positive, splat<V>(1.0f), otherwise);
}

// logit of the normal distribution function: Phi(z) = sigmoid(normal_logit(z)). An odd polynomial, least squares with
// weights that make the error of z * Phi(z) below 2e-7 of max(|gelu(z)|, 1); beyond |z| = 6.5, where Phi is below
// 4e-11, a value whose sigmoid is 0 or 1.
template <class V>
BURNISH_HD V normal_logit(V z) {
  const V s = z * z;
  V p = fma(s, splat<V>(-3.743029150515831e-11f), splat<V>(5.599023022995198e-09f));
  p = fma(p, s, splat<V>(-3.0714244303453597e-07f));
  p = fma(p, s, splat<V>(8.334816811839119e-06f));
  p = fma(p, s, splat<V>(-0.0001124928894569166f));
  p = fma(p, s, splat<V>(-6.11419600318186e-05f));
  p = fma(p, s, splat<V>(0.07266275584697723f));
  p = fma(p, s, splat<V>(1.5957705974578857f));
  // beyond, an argument as large as z is enough to end at 0 or 1
  return select(less(splat<V>(6.5f), absolute(z)), z * splat<V>(16.0f), z * p);
}

template <class V>
BURNISH_HD V gelu(V z) {
  return z * sigmoid(normal_logit(z));
}

template <class V>
BURNISH_HD V gelu_slope(V z) {
  const V density = exp_negative(z * z * splat<V>(-0.5f)) * splat<V>(0.39894228040143267794f);
  return fma(z, density, sigmoid(normal_logit(z)));
}

// 2 * sqrt(2 / pi) * (z + 0.044715 z^3), with z held where its cube is finite.
template <class V>
BURNISH_HD V held(V z) {
  const V low = select(less(z, splat<V>(-64.0f)), splat<V>(-64.0f), z);
  return select(less(splat<V>(64.0f), low), splat<V>(64.0f), low);
}

constexpr float kTwoSqrtTwoOverPi = 1.59576912160573071176f;

template <class V>
BURNISH_HD V gelu_tanh_argument(V h) {
  return splat<V>(kTwoSqrtTwoOverPi) * fma(h * (h * h), splat<V>(0.044715f), h);
}

// z * (1 + tanh(u)) / 2 is z * sigmoid(2 u).
template <class V>
BURNISH_HD V gelu_tanh(V z) {
  return z * sigmoid(gelu_tanh_argument(held(z)));
}

template <class V>
BURNISH_HD V gelu_tanh_slope(V z) {
  const V h = held(z);
  const SigmoidPair<V> s = sigmoid_pair(gelu_tanh_argument(h));
  const V slope = splat<V>(kTwoSqrtTwoOverPi) * fma(h * h, splat<V>(3.0f * 0.044715f), splat<V>(1.0f));
  return fma(z, s.at * s.mirrored * slope, s.at);
}

template <class V>
BURNISH_HD V silu(V z) {
  return z * sigmoid(z);
}

template <class V>
BURNISH_HD V silu_slope(V z) {
  const SigmoidPair<V> s = sigmoid_pair(z);
  return s.at * fma(z, s.mirrored, splat<V>(1.0f));
}

template <class V>
BURNISH_HD V activate(V z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return relu(z);
    case Activation::kGelu:
      return gelu(z);
    case Activation::kGeluTanh:
      return gelu_tanh(z);
    case Activation::kSilu:
      return silu(z);
    default:
      return z;
  }
}

// The derivative of activate; 1 for none.
template <class V>
BURNISH_HD V activation_slope(V z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return relu_slope(z);
    case Activation::kGelu:
      return gelu_slope(z);
    case Activation::kGeluTanh:
      return gelu_tanh_slope(z);
    case Activation::kSilu:
      return silu_slope(z);
    default:
      return splat<V>(1.0f);
  }
}

}  // namespace burnish
