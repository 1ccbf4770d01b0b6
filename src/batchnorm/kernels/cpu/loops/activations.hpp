// The activations on vectors: one struct each, and one list, from which come their names and the kernels' instances.
//
// Parameters are torch's defaults. `value(z)` lets NaN through; `grad(dy, z)` is dy times the derivative at z, with
// torch's choice at a kink. In float32, exp is a polynomial (relative error below 2e-7) and erf comes from it; in
// float64 they are the standard library's, lane by lane. `brief`: a few instructions, less than a call.
#pragma once

#include <cmath>
#include <type_traits>

#include "loops/simd.hpp"

namespace batchnorm {
namespace {

// --- what they are made of -------------------------------------------------------------------------------------------

// 0 below -87 and infinity above 88, so that a product with it has its limit; NaN stays.
BN_INLINE Floats exponential(Floats x) {
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
  const Floats inside = p * as_floats((as_bits(shifted) + 127) << 23);
  return x > 88.0f ? splat<Floats>(__builtin_inff()) : (x < -87.0f ? Floats{} : inside);
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

// tanh(z): near 0, where a quotient of exponentials would cancel, an odd polynomial (Cephes' tanhf).
BN_INLINE Floats hyperbolic_tangent(Floats z) {
  const Floats magnitude = z < 0 ? -z : z, square = z * z;
  Floats p = splat<Floats>(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats near = z + z * square * p, far = 1 - 2 / (exponential(2 * magnitude) + 1);
  return magnitude < 0.625f ? near : (z < 0 ? -far : far);
}

// Inlined: out of line it was measured to cost 4 to 10% with vectors of two and four values.
template <double (*Function)(double)>
BN_INLINE Doubles lane_by_lane(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = Function(x[i]);
  return x;
}

BN_INLINE Doubles exponential(Doubles x) { return lane_by_lane<std::exp>(x); }
BN_INLINE Doubles error_function(Doubles t) { return lane_by_lane<std::erf>(t); }
BN_INLINE Doubles hyperbolic_tangent(Doubles z) { return lane_by_lane<std::tanh>(z); }

template <class V>
BN_INLINE V logistic(V z) {
  return 1 / (1 + exponential(-z));
}

// The derivative of `logistic`, from exp(-|z|): nothing cancels.
template <class V>
BN_INLINE V logistic_density(V z) {
  const V e = exponential(z < 0 ? z : -z);
  return e / ((1 + e) * (1 + e));
}

// z between bounds: where an activation's derivative has reached its limit, which at infinity would be 0 times infinity.
template <class V>
BN_INLINE V clamped(V z, Scalar<V> low, Scalar<V> high) {
  const V above = z < low ? splat<V>(low) : z;
  return above > high ? splat<V>(high) : above;
}

// The distribution function of the standard normal distribution.
template <class V>
BN_INLINE V normal(V z) {
  const V e = error_function((z < 0 ? -z : z) * static_cast<Scalar<V>>(0.70710678118654752));
  return (1 + (z < 0 ? -e : e)) / 2;
}

// --- the activations -------------------------------------------------------------------------------------------------

struct Identity {
  static constexpr char name[] = "";
  static constexpr bool brief = true;
  template <class V>
  static BN_INLINE V value(V z) {
    return z;
  }
  template <class V>
  static BN_INLINE V grad(V dy, V) {
    return dy;
  }
};

struct Relu {
  static constexpr char name[] = "relu";
  static constexpr bool brief = true;
  template <class V>
  static BN_INLINE V value(V z) {
    return z < 0 ? V{} : z;
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    return z <= 0 ? V{} : dy;
  }
};

struct Relu6 {
  static constexpr char name[] = "relu6";
  static constexpr bool brief = true;
  template <class V>
  static BN_INLINE V value(V z) {
    const V low = z < 0 ? V{} : z;
    return low > 6 ? splat<V>(6) : low;
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    return z > 0 ? (z < 6 ? dy : V{}) : V{};
  }
};

struct LeakyRelu {
  static constexpr char name[] = "leaky_relu";
  static constexpr bool brief = true;
  template <class V>
  static BN_INLINE V value(V z) {
    return z < 0 ? z * static_cast<Scalar<V>>(0.01) : z;
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    return z > 0 ? dy : dy * static_cast<Scalar<V>>(0.01);
  }
};

struct Elu {
  static constexpr char name[] = "elu";
  static constexpr bool brief = false;
  template <class V>
  static BN_INLINE V value(V z) {
    return z > 0 ? z : exponential(z) - 1;
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    return z > 0 ? dy : dy * exponential(z);
  }
};

struct Silu {
  static constexpr char name[] = "silu";
  static constexpr bool brief = false;
  template <class V>
  static BN_INLINE V value(V z) {
    return z * logistic(z);
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    const V s = logistic(z);
    return dy * s * (1 + clamped<V>(z, -1000, 1000) * (1 - s));
  }
};

struct Gelu {
  static constexpr char name[] = "gelu";
  static constexpr bool brief = false;
  template <class V>
  static BN_INLINE V value(V z) {
    return z * normal(z);
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    const V near = clamped<V>(z, -100, 100);
    const V density = exponential(-(near * near) / 2) * static_cast<Scalar<V>>(0.39894228040143268);
    return dy * (normal(z) + near * density);
  }
};

struct Hardswish {
  static constexpr char name[] = "hardswish";
  static constexpr bool brief = true;
  template <class V>
  static BN_INLINE V value(V z) {
    const V gate = z + 3, low = gate < 0 ? V{} : gate;
    return z * ((low > 6 ? splat<V>(6) : low) / 6);
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    const V inside = dy * (z / 3 + static_cast<Scalar<V>>(0.5));
    return z <= -3 ? V{} : (z < 3 ? inside : dy);
  }
};

// z tanh(softplus(z)). With e = exp(z) and w = e (e + 2), tanh(softplus(z)) = w / (w + 2). Beyond z = 20 that is 1 to
// the last bit, and its derivative nothing, in float64 too; so e stays below 5e8, and its fourth power finite.
struct Mish {
  static constexpr char name[] = "mish";
  static constexpr bool brief = false;
  template <class V>
  static BN_INLINE V value(V z) {
    const V e = exponential(near(z)), w = e * (e + 2);
    return z * (w / (w + 2));
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    const V n = near(z), e = exponential(n), w = e * (e + 2), d = w + 2;
    return dy * (w / d + n * (4 * e * (e + 1)) / (d * d));
  }

 private:
  template <class V>
  static BN_INLINE V near(V z) {
    return clamped<V>(z, -1000, 20);
  }
};

struct Sigmoid {
  static constexpr char name[] = "sigmoid";
  static constexpr bool brief = false;
  template <class V>
  static BN_INLINE V value(V z) {
    return logistic(z);
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    return dy * logistic_density(z);
  }
};

struct Tanh {
  static constexpr char name[] = "tanh";
  static constexpr bool brief = false;
  template <class V>
  static BN_INLINE V value(V z) {
    return hyperbolic_tangent(z);
  }
  template <class V>
  static BN_INLINE V grad(V dy, V z) {
    return dy * 4 * logistic_density(2 * z);
  }
};

// --- the list --------------------------------------------------------------------------------------------------------

template <class... A>
struct ActivationList {
  static constexpr const char* names[] = {A::name..., nullptr};
};

// `Affine::activation` counts from here; Identity comes first.
using Activations =
    ActivationList<Identity, Relu, Relu6, LeakyRelu, Elu, Silu, Gelu, Hardswish, Mish, Sigmoid, Tanh>;

// --- in loops --------------------------------------------------------------------------------------------------------

// Which activations have loops of their own: the first two for every type; for float32 and float64 those that add little
// to a loop; and for float32 one that whole families of networks use.
template <class T, class A>
constexpr bool own_loops = std::is_same_v<A, Identity> || std::is_same_v<A, Relu> || (A::brief && sizeof(T) >= 4) ||
                           (std::is_same_v<A, Silu> && std::is_same_v<T, float>);

// f(the activation with this index), of those that have loops of their own over T, or of those that do not; false where
// it is of the other kind.
template <class T, bool Own, class F, class... A>
BN_INLINE bool with_activation(ActivationList<A...>, int index, F f) {
  int i = 0;
  const auto is = [&]<class B>(B activation) {
    const bool chosen = i++ == index && own_loops<T, B> == Own;
    if constexpr (own_loops<T, B> == Own)
      if (chosen) f(activation);
    return chosen;
  };
  return (is(A{}) || ...);
}

// Those without, chosen for each vector anew. That costs little: the processor foresees it, and the rest takes longer.
// Loops of their own would make the compilation several times as long.
template <class T>
struct Other {
  static constexpr bool brief = false;
  int index;

  template <class V>
  BN_INLINE V value(V z) const {
    V y = z;
    with_activation<T, false>(Activations{}, index, [&]<class A>(A) { y = A::value(z); });
    return y;
  }

  template <class V>
  BN_INLINE V grad(V dy, V z) const {
    V dz = dy;
    with_activation<T, false>(Activations{}, index, [&]<class A>(A) { dz = A::grad(dy, z); });
    return dz;
  }
};

// f(what a loop over T is compiled for), for the activation with this index.
template <class T, class F>
BN_INLINE void for_activation(int index, F f) {
  if (!with_activation<T, true>(Activations{}, index, f)) f(Other<T>{index});
}

}  // namespace
}  // namespace batchnorm
