// What a loop does at a time: a vector of adjacent values or a part of one, and the coefficients that belong to them.
#pragma once

#include <cstdint>
#include <cstring>

#include "loops/kernels.hpp"
#include "loops/simd.hpp"
#include "loops/sums.hpp"

namespace batchnorm {
namespace {

// --- per-channel coefficients: one value for a whole run, or one for each value of a row -----------------------------

template <class S>
BN_INLINE const S* values(const PerChannel& v) {
  if constexpr (sizeof(S) == sizeof(double))
    return v.exact;
  else
    return v.rounded;
}

// A run's are read once: the loop's stores could, for all that the compiler knows, change them.
template <class V>
struct OfRun {
  V value;
  BN_INLINE OfRun(const PerChannel& v, int64_t channel) : value(splat<V>(values<Scalar<V>>(v)[channel])) {}
  BN_INLINE V operator()(int64_t) const { return value; }
  BN_INLINE V part(int64_t, int64_t) const { return value; }
};

template <class V>
struct OfRow {
  const Scalar<V>* p;
  BN_INLINE OfRow(const PerChannel& v, int64_t channel) : p(values<Scalar<V>>(v) + channel) {}
  BN_INLINE V operator()(int64_t i) const { return load_raw<V>(p + i); }
  BN_INLINE V part(int64_t i, int64_t n) const { return load_part(p + i, n); }
};

// All of a run or row that begins with this channel.
template <class C>
struct Normalizing {
  C mean, scale, shift;
  BN_INLINE Normalizing(const Affine& a, int64_t channel)
      : mean(a.mean, channel), scale(a.scale, channel), shift(a.shift, channel) {}
};

template <class C>
struct Differentiating : Normalizing<C> {
  C slope, offset;
  BN_INLINE Differentiating(const Affine& a, const GradCoefficients& g, int64_t channel)
      : Normalizing<C>(a, channel), slope(g.slope, channel), offset(g.offset, channel) {}
};

template <class V>
BN_INLINE V affine(V x, V mean, V scale, V shift) {
  return (x - mean) * scale + shift;
}

// --- access to memory: kLanes adjacent values, or n < kLanes at an end of a run -------------------------------------

template <class T>
struct Whole {
  static constexpr bool whole = true;
  static BN_INLINE Vector<T> load(const void* p, int64_t i) {
    return Element<T>::load(static_cast<const T*>(p) + i);
  }
  static BN_INLINE void store(void* p, int64_t i, Vector<T> v, bool stream) {
    const auto value = Element<T>::rounded(v);
    if (stream)
      stream_raw(static_cast<T*>(p) + i, value);
    else
      store_raw(static_cast<T*>(p) + i, value);
  }
  template <class C>
  static BN_INLINE Vector<T> coefficient(const C& c, int64_t k) {
    return c(k);
  }
};

// A vector that does not begin where a whole one would: its address is any.
template <class T>
struct Overlapping : Whole<T> {
  static constexpr bool whole = false;
  static BN_INLINE void store(void* p, int64_t i, Vector<T> v, bool) { Whole<T>::store(p, i, v, false); }
};

template <class T>
struct Part {
  static constexpr bool whole = false;
  int64_t n;
  BN_INLINE Vector<T> load(const void* p, int64_t i) const { return load_part(static_cast<const T*>(p) + i, n); }
  BN_INLINE void store(void* p, int64_t i, Vector<T> v, bool) const { store_part(static_cast<T*>(p) + i, v, n); }
  template <class C>
  BN_INLINE Vector<T> coefficient(const C& c, int64_t k) const {
    return c.part(k, n);
  }
};

// Values of another type, as float64.
template <class T>
BN_INLINE void load_doubles(Whole<T>, const double* p, Doubles (&wide)[Sum<Vector<T>>::parts]) {
  for (int i = 0; i < Sum<Vector<T>>::parts; ++i) wide[i] = load_raw<Doubles>(p + i * kLanes<Doubles>);
}

template <class T>
BN_INLINE void load_doubles(Whole<T>, const float* p, Doubles (&wide)[Sum<Vector<T>>::parts]) {
  if constexpr (Sum<Vector<T>>::parts == 1)
    wide[0] = __builtin_convertvector(load_raw<HalfFloats>(p), Doubles);
  else
    widen(load_raw<Floats>(p), wide);
}

template <class T, class S>
BN_INLINE void load_doubles(Part<T> part, const S* p, Doubles (&wide)[Sum<Vector<T>>::parts]) {
  S values[kLanes<Vector<T>>] = {};
  std::memcpy(values, p, part.n * sizeof(S));
  load_doubles(Whole<T>{}, values, wide);
}

// How many values of a run come before its first aligned vector. Only streamed outputs must be aligned: 0 for others.
template <class T>
BN_INLINE int64_t unaligned_head(const void* output, int64_t at, int64_t length, bool stream) {
  if (!stream) return 0;
  constexpr uintptr_t size = kLanes<Vector<T>> * sizeof(T);
  const auto address = reinterpret_cast<uintptr_t>(static_cast<const T*>(output) + at);
  const int64_t n = (size - address % size) % size / sizeof(T);
  return n < length ? n : length;
}

// step(access, i, load(access, i)) for every step of a run. Values may be computed twice: the ends of a run are whole
// vectors too, which overlap their neighbours. `head` is the first aligned vector's offset.
template <class T, class Load, class Step>
BN_INLINE void for_each_overlapping_step(int64_t length, int64_t head, Load load, Step step) {
  constexpr int64_t lanes = kLanes<Vector<T>>;
  if (length < lanes) return step(Part<T>{length}, 0, load(Part<T>{length}, 0));
  const Overlapping<T> end;
  const auto last = load(end, length - lanes);  // now: where y is x, the vector before it writes over a part of it
  if (head > 0) step(end, 0, load(end, 0));
  int64_t i = head;
  for (; i + lanes <= length; i += lanes) step(Whole<T>{}, i, load(Whole<T>{}, i));
  if (i < length) step(end, length - lanes, last);
}

// step(access, i) for every step of a run, each value once.
template <class T, class Step>
BN_INLINE void for_each_step(int64_t length, Step step) {
  int64_t i = 0;
  for (; i + kLanes<Vector<T>> <= length; i += kLanes<Vector<T>>) step(Whole<T>{}, i);
  if (i < length) step(Part<T>{length - i}, i);
}

}  // namespace
}  // namespace batchnorm
