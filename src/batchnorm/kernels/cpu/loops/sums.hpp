// Sums in float64 of vectors, and of a few in their own type, lane by lane.
#pragma once

#include <cstdint>
#include <utility>

#include "loops/simd.hpp"

namespace batchnorm {
namespace {

#if defined(__AVX512F__)
BN_INLINE Doubles low(Floats v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
BN_INLINE Doubles high(Floats v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
#elif defined(__AVX2__)
BN_INLINE Doubles low(Floats v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
BN_INLINE Doubles high(Floats v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
#else
template <int First, int... I>
BN_INLINE HalfFloats half_of(Floats v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (First + I)...);
}

BN_INLINE Doubles low(Floats v) {
  return __builtin_convertvector(half_of<0>(v, std::make_integer_sequence<int, kLanes<Doubles>>{}), Doubles);
}
BN_INLINE Doubles high(Floats v) {
  return __builtin_convertvector(half_of<kLanes<Doubles>>(v, std::make_integer_sequence<int, kLanes<Doubles>>{}),
                                 Doubles);
}
#endif

// Adds up vectors lane by lane in float64.
template <class V>
struct Sum;

template <>
struct Sum<Doubles> {
  static constexpr int parts = 1;
  Doubles part[1] = {};
  BN_INLINE void add(Doubles v) { part[0] += v; }
};

template <>
struct Sum<Floats> {
  static constexpr int parts = 2;
  Doubles part[2] = {};
  BN_INLINE void add(Floats v) { part[0] += low(v), part[1] += high(v); }
};

// The sum of all lanes, by halves.
template <int... I>
BN_INLINE double across(Doubles v, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  if constexpr (lanes >= 8) v += __builtin_shufflevector(v, v, (I + 4) % lanes...);
  if constexpr (lanes >= 4) v += __builtin_shufflevector(v, v, (I + 2) % lanes...);
  v += __builtin_shufflevector(v, v, (I + 1) % lanes...);
  return v[0];
}

template <class V>
BN_INLINE double total(const Sum<V>& sum) {
  Doubles v = sum.part[0];
  if constexpr (Sum<V>::parts == 2) v += sum.part[1];
  return across(v, std::make_integer_sequence<int, kLanes<Doubles>>{});
}

// Adds each lane to its place in memory.
template <class V>
BN_INLINE void add_to_memory(const Sum<V>& sum, double* p) {
  for (int i = 0; i < Sum<V>::parts; ++i) {
    double* at = p + i * kLanes<Doubles>;
    store_raw(at, load_raw<Doubles>(at) + sum.part[i]);
  }
}

// A vector as float64: one, or two halves.
BN_INLINE void widen(Doubles v, Doubles (&wide)[1]) { wide[0] = v; }
BN_INLINE void widen(Floats v, Doubles (&wide)[2]) { wide[0] = low(v), wide[1] = high(v); }

// And back.
template <int... I>
BN_INLINE Floats concatenated(HalfFloats low, HalfFloats high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, I...);
}

BN_INLINE Doubles narrowed(const Doubles (&wide)[1]) { return wide[0]; }
BN_INLINE Floats narrowed(const Doubles (&wide)[2]) {
  return concatenated(__builtin_convertvector(wide[0], HalfFloats), __builtin_convertvector(wide[1], HalfFloats),
                      std::make_integer_sequence<int, kLanes<Floats>>{});
}

// First and second moments of a few vectors about a pivot, lane by lane, in the vectors' own type: for half precision,
// whose pivots are near the mean.
template <class V>
struct FewMomentSums {
  V first{}, second{};

  BN_INLINE void add(V x, V pivot) {
    const V d = x - pivot;
    first += d;
    second += d * d;
  }
};

// The same of any number. The difference is taken in float64: in float32 it would round
// relative to the pivot's distance, and a pivot may be an outlier.
template <class V>
struct MomentSums {
  Sum<V> first, second;

  BN_INLINE void add(V x, const Doubles (&pivot)[Sum<V>::parts]) {
    Doubles wide[Sum<V>::parts];
    widen(x, wide);
    for (int i = 0; i < Sum<V>::parts; ++i) {
      const Doubles d = wide[i] - pivot[i];
      first.part[i] += d;
      second.part[i] += d * d;
    }
  }

  // With sample weights; what weighs 0 is left out, NaN included.
  BN_INLINE void add(V x, const Doubles (&pivot)[Sum<V>::parts], const Doubles (&sample_weight)[Sum<V>::parts]) {
    Doubles wide[Sum<V>::parts];
    widen(x, wide);
    for (int i = 0; i < Sum<V>::parts; ++i) {
      const Doubles d = sample_weight[i] != 0 ? wide[i] - pivot[i] : Doubles{}, part = sample_weight[i] * d;
      first.part[i] += part;
      second.part[i] += part * d;
    }
  }

  BN_INLINE void add(const MomentSums& m) {
    for (int i = 0; i < Sum<V>::parts; ++i) first.part[i] += m.first.part[i], second.part[i] += m.second.part[i];
  }

  BN_INLINE void add(const FewMomentSums<V>& m) { first.add(m.first), second.add(m.second); }

  BN_INLINE void add(const MomentSums& a, const MomentSums& b) { add(a), add(b); }

  // One conversion for both.
  BN_INLINE void add(const FewMomentSums<V>& a, const FewMomentSums<V>& b) {
    first.add(a.first + b.first), second.add(a.second + b.second);
  }
};

}  // namespace
}  // namespace batchnorm
