// The loops, compiled once for each instruction set (BN_LEVEL is its name).
//
// The order of every sum is fixed by the shape and the range that is asked for, never by threads or addresses.
#include "kernels.hpp"

#include <type_traits>

#include "activations.hpp"
#include "simd.hpp"

namespace {

using namespace batchnorm;

// --- per-channel coefficients: one value for a whole run, or one for each value of a row -----------------------------

template <class S>
BN_INLINE const S* values(const PerChannel& v) {
  if constexpr (sizeof(S) == sizeof(double))
    return v.exact;
  else
    return v.rounded;
}

template <class V>
using Scalar = std::remove_cvref_t<decltype(V{}[0])>;

template <class V>
struct Broadcast {
  int64_t channel;
  BN_INLINE V operator()(const PerChannel& v, int64_t) const { return splat<V>(values<Scalar<V>>(v)[channel]); }
  BN_INLINE V part(const PerChannel& v, int64_t i, int64_t) const { return (*this)(v, i); }
};

template <class V>
struct Elementwise {
  BN_INLINE V operator()(const PerChannel& v, int64_t i) const { return load_raw<V>(values<Scalar<V>>(v) + i); }
  BN_INLINE V part(const PerChannel& v, int64_t i, int64_t n) const {
    return load_part(values<Scalar<V>>(v) + i, n);
  }
};

template <class V>
BN_INLINE V affine(V x, V mean, V scale, V shift) {
  return (x - mean) * scale + shift;
}

// --- a step: kLanes adjacent values, or the last n < kLanes of a run -------------------------------------------------

template <class T>
struct Whole {
  static BN_INLINE Vector<T> load(const void* p, int64_t i) {
    return Element<T>::load(static_cast<const T*>(p) + i);
  }
  static BN_INLINE void store(void* p, int64_t i, Vector<T> v) { Element<T>::store(static_cast<T*>(p) + i, v); }
  template <class C>
  static BN_INLINE Vector<T> coefficient(const C& c, const PerChannel& v, int64_t k) {
    return c(v, k);
  }
};

template <class T>
struct Part {
  int64_t n;
  BN_INLINE Vector<T> load(const void* p, int64_t i) const { return load_part(static_cast<const T*>(p) + i, n); }
  BN_INLINE void store(void* p, int64_t i, Vector<T> v) const { store_part(static_cast<T*>(p) + i, v, n); }
  template <class C>
  BN_INLINE Vector<T> coefficient(const C& c, const PerChannel& v, int64_t k) const {
    return c.part(v, k, n);
  }
};

// step(which, i) for every step of a run.
template <class T, class Step>
BN_INLINE void for_each_step(int64_t length, Step step) {
  int64_t i = 0;
  for (; i + kLanes<Vector<T>> <= length; i += kLanes<Vector<T>>) step(Whole<T>{}, i);
  if (i < length) step(Part<T>{length - i}, i);
}

// dz of the values at i, which are x; the coefficients stand at k. Where a step is partial its other lanes are 0.
template <class T, Activation A, bool Residual, class Which, class C>
BN_INLINE Vector<T> preactivation_grad(const Backward& t, const Affine& a, Which which, C c, int64_t i, int64_t k,
                                       Vector<T> x) {
  const Vector<T> dy = loaded(which.load(t.dy, i));
  if constexpr (A == Activation::none) return dy;
  Vector<T> z = affine(x, which.coefficient(c, a.mean, k), which.coefficient(c, a.scale, k),
                       which.coefficient(c, a.shift, k));
  if constexpr (Residual) z += which.load(t.residual, i);
  return activate_grad<A>(dy, z);
}

template <class T, Activation A, bool Residual, class C>
BN_INLINE void apply_run(const Forward& t, const Affine& a, C c, int64_t at, int64_t length) {
  for_each_step<T>(length, [&](auto which, int64_t k) {
    Vector<T> z = affine(which.load(t.x, at + k), which.coefficient(c, a.mean, k), which.coefficient(c, a.scale, k),
                         which.coefficient(c, a.shift, k));
    if constexpr (Residual) z += which.load(t.residual, at + k);
    which.store(t.y, at + k, activate<A>(z));
  });
}

template <class T, Activation A, bool Residual, class C>
BN_INLINE void grad_run(const Backward& t, const Affine& a, const Slopes& s, C c, int64_t at, int64_t length) {
  for_each_step<T>(length, [&](auto which, int64_t k) {
    const Vector<T> x = which.load(t.x, at + k);
    const Vector<T> dz = preactivation_grad<T, A, Residual>(t, a, which, c, at + k, k, x);
    if constexpr (Residual && A != Activation::none) which.store(t.dresidual, at + k, dz);
    const Vector<T> rest = affine(x, which.coefficient(c, a.mean, k), which.coefficient(c, s.slope, k),
                                  which.coefficient(c, s.offset, k));
    which.store(t.dx, at + k, dz * which.coefficient(c, a.scale, k) + rest);
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

// So many rows, or vectors of a run, are taken together: the sums of a channel are read and written once for the whole
// group, and a gradient's few terms are added up in their own type before they join the float64 sum. (Moments are not:
// their differences from the pivot must not round.)
constexpr int64_t kGroup = 8;

template <int64_t N>
struct Rows {
  static constexpr int64_t count = N;
};

// group(offset of the first row, Rows<how many>) for the range.
template <class Group>
BN_INLINE void for_each_group(const Walk& w, int64_t begin, int64_t end, Group group) {
  for (; begin + kGroup * w.channels <= end; begin += kGroup * w.channels) group(begin, Rows<kGroup>{});
  for (; begin < end; begin += w.channels) group(begin, Rows<1>{});
}

template <class V>
BN_INLINE void load_pivots(const double* p, Doubles (&pivot)[Sum<V>::parts]) {
  for (int i = 0; i < Sum<V>::parts; ++i) pivot[i] = load_raw<Doubles>(p + i * kLanes<Doubles>);
}

template <class V>
BN_INLINE void spill(const MomentSums<V>& m, double* first, double* second) {
  for (int i = 0; i < Sum<V>::parts; ++i) {
    spill(m.first[i], first + i * kLanes<Doubles>);
    spill(m.second[i], second + i * kLanes<Doubles>);
  }
}

template <class T>
void moments(const Walk& w, const void* data, const double* pivots, int64_t begin, int64_t end, Sums sums) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  const T* x = static_cast<const T*>(data);
  if (!w.rows()) {
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      MomentSums<V> m;
      Doubles pivot[Sum<V>::parts];
      for (auto& p : pivot) p = splat<Doubles>(pivots[channel]);
      double first = 0, second = 0;
      int64_t i = 0;
      for (; i + lanes <= length; i += lanes) m.add(Element<T>::load(x + at + i), pivot);
      if (i < length) {  // the lanes that are not there would count as 0 - pivot: one by one
        Scalar<V> rest[lanes];
        store_raw(rest, load_part(x + at + i, length - i));
        for (int64_t j = 0; j < length - i; ++j) {
          const double d = rest[j] - pivots[channel];
          first += d, second += d * d;
        }
      }
      for (int p = 0; p < Sum<V>::parts; ++p) first += total(m.first[p]), second += total(m.second[p]);
      sums.first[channel] += first, sums.second[channel] += second;
    });
    return;
  }
  for_each_group(w, begin, end, [&](int64_t at, auto rows) {
    int64_t c = 0;
    for (; c + lanes <= w.channels; c += lanes) {
      MomentSums<V> m;
      Doubles pivot[Sum<V>::parts];
      load_pivots<V>(pivots + c, pivot);
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows.count; ++r) m.add(Element<T>::load(x + at + r * w.channels + c), pivot);
      spill(m, sums.first + c, sums.second + c);
    }
    if (const int64_t n = w.channels - c; n > 0) {
      for (int64_t r = 0; r < rows.count; ++r) {
        Scalar<V> rest[lanes];
        store_raw(rest, load_part(x + at + r * w.channels + c, n));
        for (int64_t j = 0; j < n; ++j) {
          const double d = rest[j] - pivots[c + j];
          sums.first[c + j] += d, sums.second[c + j] += d * d;
        }
      }
    }
  });
}

template <class T, Activation A, bool Residual>
void sums(const Walk& w, const Backward& t, const Affine& a, int64_t begin, int64_t end, Sums sums) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  if (!w.rows()) {
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      const Broadcast<V> c{channel};
      Sum<V> first, second;
      for (int64_t i = 0; i < length; i += kGroup * lanes) {
        V f{}, s{};
        for_each_step<T>(length - i < kGroup * lanes ? length - i : kGroup * lanes, [&](auto which, int64_t j) {
          const V x = which.load(t.x, at + i + j);
          const V dz = preactivation_grad<T, A, Residual>(t, a, which, c, at + i + j, i + j, x);
          f += dz;
          s += dz * (x - c(a.mean, 0));
        });
        first.add(f);
        second.add(s);
      }
      sums.first[channel] += total(first), sums.second[channel] += total(second);
    });
    return;
  }
  const Elementwise<V> coefficients;
  for_each_group(w, begin, end, [&](int64_t at, auto rows) {
    for_each_step<T>(w.channels, [&](auto which, int64_t c) {
      V f{}, s{};
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t i = at + r * w.channels + c;
        const V x = which.load(t.x, i);
        const V dz = preactivation_grad<T, A, Residual>(t, a, which, coefficients, i, c, x);
        f += dz;
        s += dz * (x - which.coefficient(coefficients, a.mean, c));
      }
      Sum<V> first, second;
      first.add(f);
      second.add(s);
      if constexpr (std::is_same_v<decltype(which), Whole<T>>) {
        spill(first, sums.first + c);
        spill(second, sums.second + c);
      } else {
        double f[lanes] = {}, s[lanes] = {};
        spill(first, f);
        spill(second, s);
        for (int64_t j = 0; j < which.n; ++j) sums.first[c + j] += f[j], sums.second[c + j] += s[j];
      }
    });
  });
}

template <class T, Activation A, bool Residual>
void apply(const Walk& w, const Forward& t, const Affine& a, int64_t begin, int64_t end) {
  if (w.rows())
    for (; begin < end; begin += w.channels) apply_run<T, A, Residual>(t, a, Elementwise<Vector<T>>{}, begin, w.channels);
  else
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      apply_run<T, A, Residual>(t, a, Broadcast<Vector<T>>{channel}, at, length);
    });
}

template <class T, Activation A, bool Residual>
void grad(const Walk& w, const Backward& t, const Affine& a, const Slopes& s, int64_t begin, int64_t end) {
  if (w.rows())
    for (; begin < end; begin += w.channels)
      grad_run<T, A, Residual>(t, a, s, Elementwise<Vector<T>>{}, begin, w.channels);
  else
    for_each_run(w, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      grad_run<T, A, Residual>(t, a, s, Broadcast<Vector<T>>{channel}, at, length);
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
constexpr Kernels kernels_for = {moments<T>, any_sums<T>, any_apply<T>, any_grad<T>};

}  // namespace

namespace batchnorm::BN_LEVEL {

// In the order of Dtype.
extern const Kernels kernels[4];
const Kernels kernels[4] = {kernels_for<float>, kernels_for<double>, kernels_for<BFloat16>, kernels_for<Float16>};

}  // namespace batchnorm::BN_LEVEL
