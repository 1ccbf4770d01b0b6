// The activations and their derivatives on vectors, with torch's default parameters. NaN goes through.
//
// In float32 exp is a polynomial (relative error below 2e-7) and erf comes from it; in float64 they are the standard
// library's, lane by lane.
#pragma once

#include <cmath>

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using batchnorm::Activation;

BN_INLINE Floats exponential(Floats x) {
  x = x < -87.0f ? splat<Floats>(-87.0f) : x;
  x = x > 88.0f ? splat<Floats>(88.0f) : x;
  // x = n log 2 + r, |r| <= log(2) / 2; adding 1.5 * 2^23 rounds to the integer n, which stays in the low bits.
  const Floats shifted = x * 1.44269504f + 0x1.8p23f;
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = splat<Floats>(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * as_floats((as_bits(shifted) + 127) << 23);
}

// erf(t) for t >= 0, to an absolute 1.4e-7: 1 - exp(-t P(t)), P fitted to -log(erfc(t)) / t on [0, 4.1].
BN_INLINE Floats error_function(Floats t) {
  t = t > 4.1f ? splat<Floats>(4.1f) : t;
  Floats p = splat<Floats>(3.14401583e-05f);
  p = p * t - 0.000308801996f;
  p = p * t + 0.00103240062f;
  p = p * t + 0.000536935659f;
  p = p * t - 0.0195839627f;
  p = p * t + 0.102919615f;
  p = p * t + 0.636597733f;
  p = p * t + 1.12838025f;
  return 1.0f - exponential(-(p * t));
}

BN_INLINE Doubles exponential(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = std::exp(x[i]);
  return x;
}
BN_INLINE Doubles error_function(Doubles t) {
  for (int i = 0; i < kLanes<Doubles>; ++i) t[i] = std::erf(t[i]);
  return t;
}

template <class V>
BN_INLINE V sigmoid(V z) {
  return 1 / (1 + exponential(-z));
}

// The distribution function of the standard normal distribution.
template <class V>
BN_INLINE V normal(V z) {
  const V e = error_function((z < 0 ? -z : z) * static_cast<decltype(z[0] + 0)>(0.70710678118654752));
  return (1 + (z < 0 ? -e : e)) / 2;
}

template <Activation A, class V>
BN_INLINE V activate(V z) {
  using S = decltype(z[0] + 0);
  if constexpr (A == Activation::relu) return z < 0 ? V{} : z;
  if constexpr (A == Activation::leaky_relu) return z < 0 ? z * static_cast<S>(0.01) : z;
  if constexpr (A == Activation::silu) return z * sigmoid(z);
  if constexpr (A == Activation::gelu) return z * normal(z);
  if constexpr (A == Activation::hardswish) {
    const V gate = z + 3, low = gate < 0 ? V{} : gate;
    return z * (low > 6 ? splat<V>(6) : low) / 6;
  }
  if constexpr (A == Activation::elu) return z > 0 ? z : exponential(z) - 1;
  return z;
}

// dy times the derivative at z; at a kink, torch's choice.
template <Activation A, class V>
BN_INLINE V activate_grad(V dy, V z) {
  using S = decltype(z[0] + 0);
  if constexpr (A == Activation::relu) return z <= 0 ? V{} : dy;
  if constexpr (A == Activation::leaky_relu) return z > 0 ? dy : dy * static_cast<S>(0.01);
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(z);
    return dy * s * (1 + z * (1 - s));
  }
  if constexpr (A == Activation::gelu) {
    const V density = exponential(-(z * z) / 2) * static_cast<S>(0.39894228040143268);
    return dy * (normal(z) + z * density);
  }
  if constexpr (A == Activation::hardswish) {
    const V inside = dy * (z / 3 + static_cast<S>(0.5));
    return z <= -3 ? V{} : (z < 3 ? inside : dy);
  }
  if constexpr (A == Activation::elu) return z > 0 ? dy : dy * exponential(z);
  return dy;
}

}  // namespace
