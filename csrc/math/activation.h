// Epilogue activations and their slopes, written once over a value type V: float here and on a GPU, a SIMD vector in
// cpu/simd/vec.h. Every operation rounds once and every fused multiply-add is spelled, so all of them give the same
// bits. V has + - * /, and the functions of the first block; select(less(a, b), x, y) takes y at NaN, at_most and
// at_least keep a NaN in a.
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
BURNISH_HD inline float at_most(float a, float limit) { return limit < a ? limit : a; }
BURNISH_HD inline float at_least(float a, float limit) { return a < limit ? limit : a; }
// 2^n from n + 1.5 * 2^23, whose low mantissa bits are the integer n; n in [-126, 128], infinity at 128.
BURNISH_HD inline float power_of_two(float shifted) { return bits_float((float_bits(shifted) << 23) + 0x3f800000u); }
template <class V>
BURNISH_HD V splat(float a) {
  return V(a);
}

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
constexpr int kActivations = 5;

// 2^x within 1 ulp, with x held in [-126, 128]: infinity from 127.5 on. Split at the nearest integer; a minimax
// polynomial of degree 6 for the rest, 1 at 0.
template <class V>
BURNISH_HD V exp2_held(V x) {
  const V held = at_least(at_most(x, splat<V>(128.0f)), splat<V>(-126.0f));
  const V rounder = splat<V>(12582912.0f);  // 1.5 * 2^23
  const V shifted = held + rounder;
  const V r = held - (shifted - rounder);
  V p = fma(r, splat<V>(1.5353361959569156e-4f), splat<V>(1.3398875016719103e-3f));
  p = fma(p, r, splat<V>(9.61843691766262e-3f));
  p = fma(p, r, splat<V>(5.5503323674201965e-2f));
  p = fma(p, r, splat<V>(0.24022647738456726f));
  p = fma(p, r, splat<V>(0.6931471824645996f));
  p = fma(p, r, splat<V>(1.0f));
  return p * power_of_two(shifted);
}

constexpr float kLog2E = 1.44269504088896341f;

// z * sigmoid(x) from t = -x * log2(e): the smooth activations are z times the sigmoid of some function of z. The
// division by infinity ends at 0, or at NaN for an infinite z, as torch's do.
template <class V>
BURNISH_HD V gated(V z, V t) {
  return z / (splat<V>(1.0f) + exp2_held(t));
}

// sigmoid(x) and sigmoid(-x) from t = -x * log2(e), each without cancellation.
template <class V>
struct SigmoidPair {
  V at;
  V mirrored;
};

template <class V>
BURNISH_HD SigmoidPair<V> sigmoid_pair(V t) {
  const V small = gated(splat<V>(1.0f), absolute(t));
  const V large = splat<V>(1.0f) - small;
  const auto positive = less(t, splat<V>(0.0f));
  return {select(positive, large, small), select(positive, small, large)};
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

// t with Phi(z) = 1 / (1 + 2^t): the normal distribution function's logit by -log2(e), an odd polynomial, least squares
// with weights that keep the error of z * Phi(z) below 2e-7 of max(|gelu(z)|, 1). Beyond |z| = 6.5, where Phi is below
// 4e-11, it goes on as a straight line.
template <class V>
BURNISH_HD V normal_exponent(V z) {
  const V s = at_most(z * z, splat<V>(42.25f));
  V p = fma(s, splat<V>(5.4001459554031683e-11f), splat<V>(-8.07762301491266e-9f));
  p = fma(p, s, splat<V>(4.431100819601852e-7f));
  p = fma(p, s, splat<V>(-1.2024563147861045e-5f));
  p = fma(p, s, splat<V>(1.6229276661761105e-4f));
  p = fma(p, s, splat<V>(8.820953371468931e-5f));
  p = fma(p, s, splat<V>(-0.10483019798994064f));
  p = fma(p, s, splat<V>(-2.3022103309631348f));
  return z * p;
}

template <class V>
BURNISH_HD V gelu(V z) {
  return gated(z, normal_exponent(z));
}

template <class V>
BURNISH_HD V gelu_slope(V z) {
  const V density = splat<V>(0.39894228040143267794f) / exp2_held(z * z * splat<V>(0.5f * kLog2E));
  return fma(z, density, gated(splat<V>(1.0f), normal_exponent(z)));
}

constexpr float kTwoSqrtTwoOverPi = 1.59576912160573071176f;
constexpr float kGeluCubic = 0.044715f;

// z * (1 + tanh(u)) / 2 is z * sigmoid(2 u), with 2 u = 2 * sqrt(2 / pi) * (z + 0.044715 z^3).
template <class V>
BURNISH_HD V tanh_exponent(V z) {
  constexpr float kSlope = -kTwoSqrtTwoOverPi * kLog2E;
  return z * fma(z * z, splat<V>(kSlope * kGeluCubic), splat<V>(kSlope));
}

template <class V>
BURNISH_HD V gelu_tanh(V z) {
  return gated(z, tanh_exponent(z));
}

template <class V>
BURNISH_HD V gelu_tanh_slope(V z) {
  const V h = at_least(at_most(z, splat<V>(64.0f)), splat<V>(-64.0f));  // its square is finite, its slope 0 or 1
  const SigmoidPair<V> s = sigmoid_pair(tanh_exponent(h));
  const V slope = splat<V>(kTwoSqrtTwoOverPi) * fma(h * h, splat<V>(3.0f * kGeluCubic), splat<V>(1.0f));
  return fma(z, s.at * s.mirrored * slope, s.at);
}

template <class V>
BURNISH_HD V silu(V z) {
  return gated(z, z * splat<V>(-kLog2E));
}

template <class V>
BURNISH_HD V silu_slope(V z) {
  const SigmoidPair<V> s = sigmoid_pair(z * splat<V>(-kLog2E));
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
