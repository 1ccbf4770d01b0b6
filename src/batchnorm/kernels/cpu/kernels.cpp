// The loops, compiled once for each instruction set (BN_LEVEL is its name).
//
// The order of every sum is fixed by the shape and the range that is asked for, never by threads or addresses.
#include "kernels.hpp"

#include <type_traits>

#include "activations.hpp"
#include "simd.hpp"
#include "steps.hpp"
#include "weighing.hpp"

namespace {

using namespace batchnorm;

// --- runs --------------------------------------------------------------------------------------------------------------

// dz of the values at i, which are x; the coefficients stand at k. Where a step is partial its other lanes are 0.
template <class T, Activation A, bool Residual, class Which, class C>
BN_INLINE Vector<T> preactivation_grad(const Backward& t, const Affine& a, Which which, C c, int64_t i, int64_t k,
                                       Vector<T> x) {
  const Vector<T> dy = loaded(which.load(t.dy, i));
  if constexpr (A == Activation::none) return dy;
  if (t.weights) x = dy != 0 ? x : which.coefficient(c, a.mean, k);  // padding that nobody looked at
  Vector<T> z = affine(x, which.coefficient(c, a.mean, k), which.coefficient(c, a.scale, k),
                       which.coefficient(c, a.shift, k));
  if constexpr (Residual) z += which.load(t.residual, i);
  return activate_grad<A>(dy, z);
}

// dz (x - mean); with weights, padding whose gradient is 0 adds nothing whatever it holds.
template <class V>
BN_INLINE V product(const Backward& t, V dz, V deviation) {
  const V p = dz * deviation;
  return t.weights ? (dz != 0 ? p : V{}) : p;
}

template <class T, Activation A, bool Residual, class C>
BN_INLINE void apply_run(const Forward& t, const Affine& a, C c, int64_t at, int64_t length) {
  for_each_overlapping_step<T>(
      length, ahead<T>(t.y, at, length, t.stream), [&](auto which, int64_t k) { return which.load(t.x, at + k); },
      [&](auto which, int64_t k, Vector<T> x) {
        Vector<T> z = affine(x, which.coefficient(c, a.mean, k), which.coefficient(c, a.scale, k),
                             which.coefficient(c, a.shift, k));
        if constexpr (Residual) z += which.load(t.residual, at + k);
        which.store(t.y, at + k, activate<A>(z), t.stream);
      });
}

template <class T, Activation A, bool Residual, class C>
BN_INLINE void grad_run(const Backward& t, const Affine& a, const Slopes& s, RunWeights weights, C c, int64_t at,
                        int64_t length) {
  using V = Vector<T>;
  for_each_overlapping_step<T>(
      length, ahead<T>(t.dx, at, length, t.stream), [&](auto which, int64_t k) { return which.load(t.x, at + k); },
      [&](auto which, int64_t k, V x) {
        const V mean = which.coefficient(c, a.mean, k);
        const V dz = preactivation_grad<T, A, Residual>(t, a, which, c, at + k, k, x);
        if constexpr (Residual && A != Activation::none) which.store(t.dresidual, at + k, dz, t.stream);
        V rest = affine(x, mean, which.coefficient(c, s.slope, k), which.coefficient(c, s.offset, k));
        if (t.weights) rest = weights.times(which, k, rest);
        which.store(t.dx, at + k, dz * which.coefficient(c, a.scale, k) + rest, t.stream);
      });
}

// --- walks -----------------------------------------------------------------------------------------------------------

// The runs of planes in the range: run(channel, offset of the first value, length).
template <class Run>
BN_INLINE void for_each_run(const Walk& w, int64_t begin, int64_t end, Run run) {
  int64_t channel = begin / w.inner % w.channels, within = begin % w.inner;
  while (begin < end) {
    const int64_t length = w.inner - within < end - begin ? w.inner - within : end - begin;
    run(channel, begin, length);
    begin += length, within = 0;
    if (++channel == w.channels) channel = 0;
  }
}

template <int64_t N>
using Fixed = std::integral_constant<int64_t, N>;

// So many rows, or vectors of a run, are taken together: the sums of a channel are read and written once for the whole
// group, and a gradient's few terms are added up in their own type before they join the float64 sum. (Moments are not:
// their differences from the pivot must not round.)
constexpr int64_t kGroup = 8;

// group(offset of the first row, Fixed<how many rows>) for the range.
template <class Group>
BN_INLINE void for_each_group(const Walk& w, int64_t begin, int64_t end, bool single, Group group) {
  for (; !single && begin + kGroup * w.channels <= end; begin += kGroup * w.channels) group(begin, Fixed<kGroup>{});
  for (; begin < end; begin += w.channels) group(begin, Fixed<1>{});
}

// Adds each lane to its place in memory; of a part, those that are there.
template <class T, class S>
BN_INLINE void spill(Whole<T>, const S& sum, double* p) {
  spill(sum, p);
}

template <class T, class S>
BN_INLINE void spill(Part<T> part, const S& sum, double* p) {
  double values[kLanes<Vector<T>>] = {};
  spill(sum, values);
  for (int64_t i = 0; i < part.n; ++i) p[i] += values[i];
}

// A channel's or several channels' pivots, in the values' type and in float64: the same numbers, being values.
template <class V>
struct Pivot {
  V value;
  Doubles wide[Sum<V>::parts];
};

template <class T, WeightType W>
void moments(const Walk& walk, const void* x, Weights weights, const double* pivots, int64_t begin, int64_t end,
             Sums sums) {
  const Walk w = walk;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  weights.type = W;  // known to the compiler
  Spread room;
  // The values of the step at k. What equals the pivot adds nothing, whatever it weighs.
  const auto add = [&](MomentSums<V>& m, auto which, int64_t k, V value, const Pivot<V>& pivot, const RunWeights& its) {
    if constexpr (W == WeightType::none) {
      m.add(value, pivot.wide);
    } else if constexpr (W == WeightType::boolean) {
      m.add(its.counted<V>(which, k) ? value : pivot.value, pivot.wide);
    } else {
      Doubles weight[Sum<V>::parts];
      its.load<V>(which, k, weight);
      m.add(value, pivot.wide, weight);
    }
  };
  if (!w.rows()) {
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      const RunWeights its = weights_of(w, weights, at, 1, room);
      MomentSums<V> even, odd;  // two, because an addition waits for the one before it
      Pivot<V> pivot;
      pivot.value = splat<V>(pivots[channel]);
      widen(pivot.value, pivot.wide);
      const auto whole = [&](int64_t k) { return Whole<T>::load(x, at + k); };
      int64_t i = 0;
      for (; i + 2 * lanes <= length; i += 2 * lanes) {
        add(even, Whole<T>{}, i, whole(i), pivot, its);
        add(odd, Whole<T>{}, i + lanes, whole(i + lanes), pivot, its);
      }
      if (i + lanes <= length) add(even, Whole<T>{}, i, whole(i), pivot, its), i += lanes;
      if (const int64_t n = length - i; n > 0) {
        if (length < lanes)  // the lanes that are not there are the pivot
          add(odd, Part<T>{n}, 0, first_lanes(Part<T>{n}.load(x, at), n, pivot.value), pivot, its);
        else  // and so are those that were added before
          add(odd, Whole<T>{}, length - lanes, first_lanes(pivot.value, lanes - n, whole(length - lanes)), pivot, its);
      }
      even.add(odd);
      sums.first[channel] += total(even.first), sums.second[channel] += total(even.second);
    });
    return;
  }
  const bool single = joined(w, weights) && kGroup * w.channels > kWidestJoined;
  for_each_group(w, begin, end, single, [&](int64_t at, auto rows) {
    const RunWeights its = weights_of(w, weights, at, rows.value, room);
    for_each_step<T>(w.channels, [&](auto which, int64_t c) {
      MomentSums<V> m;
      Pivot<V> pivot;
      load_doubles(which, pivots + c, pivot.wide);
      pivot.value = narrowed(pivot.wide);
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows.value; ++r)
        add(m, which, c, which.load(x, at + r * w.channels + c), pivot, row_weights(its, w, r));
      spill(which, m.first, sums.first + c);
      spill(which, m.second, sums.second + c);
    });
  });
}

template <class T>
void any_moments(const Walk& w, const void* x, Weights weights, const double* pivots, int64_t begin, int64_t end,
                 Sums sums) {
  static constexpr decltype(&any_moments<T>) table[] = {moments<T, WeightType::none>, moments<T, WeightType::boolean>,
                                                        moments<T, WeightType::float32>, moments<T, WeightType::float64>};
  table[static_cast<int>(weights.type)](w, x, weights, pivots, begin, end, sums);
}

template <class T, Activation A, bool Residual>
void sums(const Walk& walk, const Backward& tensors, const Affine& affine, int64_t begin, int64_t end, Sums sums) {
  const Walk w = walk;
  const Backward t = tensors;
  const Affine a = affine;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  if (!w.rows()) {
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      const Broadcast<V> c{channel};
      Sum<V> first, second;
      // Of the values at k, the first `taken` were added before.
      const auto add = [&](V& f, V& s, auto which, int64_t k, int64_t taken) {
        const V x = which.load(t.x, at + k);
        V dz = preactivation_grad<T, A, Residual>(t, a, which, c, at + k, k, x);
        if (taken > 0) dz = first_lanes(V{}, taken, dz);
        f += dz;
        s += product(t, dz, x - c(a.mean, 0));
      };
      const int64_t whole = length / lanes * lanes, n = length - whole;
      for (int64_t i = 0; i < whole; i += kGroup * lanes) {
        const int64_t end = whole - i < kGroup * lanes ? whole : i + kGroup * lanes;
        V f{}, s{};
        for (int64_t k = i; k < end; k += lanes) add(f, s, Whole<T>{}, k, 0);
        first.add(f);
        second.add(s);
      }
      if (n > 0) {
        V f{}, s{};
        if (length < lanes)
          add(f, s, Part<T>{n}, 0, 0);
        else
          add(f, s, Whole<T>{}, length - lanes, lanes - n);
        first.add(f);
        second.add(s);
      }
      sums.first[channel] += total(first), sums.second[channel] += total(second);
    });
    return;
  }
  const Elementwise<V> coefficients;
  for_each_group(w, begin, end, false, [&](int64_t at, auto rows) {
    for_each_step<T>(w.channels, [&](auto which, int64_t c) {
      V f{}, s{};
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows.value; ++r) {
        const int64_t i = at + r * w.channels + c;
        const V x = which.load(t.x, i);
        const V dz = preactivation_grad<T, A, Residual>(t, a, which, coefficients, i, c, x);
        f += dz;
        s += product(t, dz, x - which.coefficient(coefficients, a.mean, c));
      }
      Sum<V> first, second;
      first.add(f);
      second.add(s);
      spill(which, first, sums.first + c);
      spill(which, second, sums.second + c);
    });
  });
}

template <class T, Activation A, bool Residual>
void apply(const Walk& walk, const Forward& tensors, const Affine& affine, int64_t begin, int64_t end) {
  const Walk w = walk;
  const Forward t = tensors;
  const Affine a = affine;
  if (w.rows())
    for (; begin < end; begin += w.channels) apply_run<T, A, Residual>(t, a, Elementwise<Vector<T>>{}, begin, w.channels);
  else
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      apply_run<T, A, Residual>(t, a, Broadcast<Vector<T>>{channel}, at, length);
    });
}

template <class T, Activation A, bool Residual>
void grad(const Walk& walk, const Backward& tensors, const Affine& affine, const Slopes& slopes, int64_t begin, int64_t end) {
  const Walk w = walk;
  const Backward t = tensors;
  const Affine a = affine;
  const Slopes s = slopes;
  Spread room;
  if (w.rows())
    for (; begin < end; begin += w.channels)
      grad_run<T, A, Residual>(t, a, s, weights_of(w, t.weights, begin, 1, room), Elementwise<Vector<T>>{}, begin,
                               w.channels);
  else
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      grad_run<T, A, Residual>(t, a, s, weights_of(w, t.weights, at, 1, room), Broadcast<Vector<T>>{channel}, at,
                               length);
    });
}

// --- tables: an instance for every activation, with and without a residual -------------------------------------------

#define BN_INSTANCES(kernel, T)                                                                                   \
  {{kernel<T, Activation::none, false>, kernel<T, Activation::none, true>},                                       \
   {kernel<T, Activation::relu, false>, kernel<T, Activation::relu, true>},                                       \
   {kernel<T, Activation::leaky_relu, false>, kernel<T, Activation::leaky_relu, true>},                           \
   {kernel<T, Activation::silu, false>, kernel<T, Activation::silu, true>},                                       \
   {kernel<T, Activation::gelu, false>, kernel<T, Activation::gelu, true>},                                       \
   {kernel<T, Activation::hardswish, false>, kernel<T, Activation::hardswish, true>},                             \
   {kernel<T, Activation::elu, false>, kernel<T, Activation::elu, true>}}

template <class T>
void any_sums(const Walk& w, const Backward& t, const Affine& a, int64_t begin, int64_t end, Sums s) {
  static constexpr decltype(&any_sums<T>) table[][2] = BN_INSTANCES(sums, T);
  table[static_cast<int>(a.activation)][t.residual != nullptr](w, t, a, begin, end, s);
}
template <class T>
void any_apply(const Walk& w, const Forward& t, const Affine& a, int64_t begin, int64_t end) {
  static constexpr decltype(&any_apply<T>) table[][2] = BN_INSTANCES(apply, T);
  table[static_cast<int>(a.activation)][t.residual != nullptr](w, t, a, begin, end);
}
template <class T>
void any_grad(const Walk& w, const Backward& t, const Affine& a, const Slopes& s, int64_t begin, int64_t end) {
  static constexpr decltype(&any_grad<T>) table[][2] = BN_INSTANCES(grad, T);
  table[static_cast<int>(a.activation)][t.residual != nullptr](w, t, a, s, begin, end);
}

template <class T>
constexpr Kernels kernels_for = {any_moments<T>, any_sums<T>, any_apply<T>, any_grad<T>};

}  // namespace

namespace batchnorm::BN_LEVEL {

// In the order of Dtype.
extern const Kernels kernels[4];
const Kernels kernels[4] = {kernels_for<float>, kernels_for<double>, kernels_for<BFloat16>, kernels_for<Float16>};

}  // namespace batchnorm::BN_LEVEL
