// The loops, compiled once for each instruction set (BN_LEVEL is its name).
//
// The order of every sum is fixed by the shape and the range that is asked for, never by threads or addresses.
#include "loops/kernels.hpp"

#include <type_traits>

#include "loops/activations.hpp"
#include "loops/run_mask.hpp"
#include "loops/simd.hpp"
#include "loops/steps.hpp"

namespace batchnorm {
namespace {

// --- runs ------------------------------------------------------------------------------------------------------------

// dz of the values at i, which are x, with the coefficients at k. Where a vector is partial its other lanes are 0.
template <class T, class A, bool Residual, class Access, class C>
BN_INLINE Vector<T> preactivation_grad(const Backward& t, const Affine& a, Access access, C c, int64_t i, int64_t k,
                                       Vector<T> x) {
  const Vector<T> dy = loaded(access.load(t.dy, i));
  if constexpr (std::is_same_v<A, Identity>) return dy;
  if (t.mask) x = dy != 0 ? x : access.coefficient(c, a.mean, k);  // padding, which may be NaN
  Vector<T> z = affine(x, access.coefficient(c, a.mean, k), access.coefficient(c, a.scale, k),
                       access.coefficient(c, a.shift, k));
  if constexpr (Residual) z += access.load(t.residual, i);
  return A::grad(dy, z);
}

// dz (x - mean); with a mask, padding whose gradient is 0 adds nothing whatever it holds.
template <class V>
BN_INLINE V product(const Backward& t, V dz, V deviation) {
  const V p = dz * deviation;
  return t.mask ? (dz != 0 ? p : V{}) : p;
}

template <class T, class A, bool Residual, class C>
BN_INLINE void apply_run(const Forward& t, const Affine& a, C c, int64_t at, int64_t length) {
  for_each_overlapping_step<T>(
      length, unaligned_head<T>(t.y, at, length, t.stream),
      [&](auto access, int64_t k) { return access.load(t.x, at + k); },
      [&](auto access, int64_t k, Vector<T> x) {
        Vector<T> z = affine(x, access.coefficient(c, a.mean, k), access.coefficient(c, a.scale, k),
                             access.coefficient(c, a.shift, k));
        if constexpr (Residual) z += access.load(t.residual, at + k);
        access.store(t.y, at + k, A::value(z), t.stream);
      });
}

template <class T, class A, bool Residual, class C>
BN_INLINE void grad_run(const Backward& t, const Affine& a, const GradCoefficients& s, RunMask mask, C c, int64_t at,
                        int64_t length) {
  using V = Vector<T>;
  for_each_overlapping_step<T>(
      length, unaligned_head<T>(t.dx, at, length, t.stream),
      [&](auto access, int64_t k) { return access.load(t.x, at + k); },
      [&](auto access, int64_t k, V x) {
        const V mean = access.coefficient(c, a.mean, k);
        const V dz = preactivation_grad<T, A, Residual>(t, a, access, c, at + k, k, x);
        if constexpr (Residual && !std::is_same_v<A, Identity>) access.store(t.dresidual, at + k, dz, t.stream);
        const V direct = dz * access.coefficient(c, a.scale, k);
        if (s.constants) {
          access.store(t.dx, at + k, direct, t.stream);
          return;
        }
        V rest = affine(x, mean, access.coefficient(c, s.slope, k), access.coefficient(c, s.offset, k));
        if (t.mask) rest = mask.times(access, k, rest);
        access.store(t.dx, at + k, direct + rest, t.stream);
      });
}

// --- ranges ----------------------------------------------------------------------------------------------------------

// The runs of planes in the range: run(channel, offset of the first value, length).
template <class Run>
BN_INLINE void for_each_run(const Extents& e, int64_t begin, int64_t end, Run run) {
  int64_t channel = begin / e.inner % e.channels, within = begin % e.inner;
  while (begin < end) {
    const int64_t length = e.inner - within < end - begin ? e.inner - within : end - begin;
    run(channel, begin, length);
    begin += length, within = 0;
    if (++channel == e.channels) channel = 0;
  }
}

template <int64_t N>
using Fixed = std::integral_constant<int64_t, N>;

// How many rows, or vectors of a run, are taken together: the sums of a channel are read and written once for the whole
// group, and a gradient's few terms are added up in their own type before they go into the float64 sum. (Moments are
// not: their differences from the pivot must not round.)
constexpr int64_t kGroup = 8;

// group(offset of the first row, Fixed<how many rows>) for the range.
template <class Group>
BN_INLINE void for_each_group(const Extents& e, int64_t begin, int64_t end, bool single, Group group) {
  for (; !single && begin + kGroup * e.channels <= end; begin += kGroup * e.channels) group(begin, Fixed<kGroup>{});
  for (; begin < end; begin += e.channels) group(begin, Fixed<1>{});
}

// Adds each lane to its place in memory; of a part, those that exist.
template <class T, class S>
BN_INLINE void add_to_memory(Whole<T>, const S& sum, double* p) {
  add_to_memory(sum, p);
}

template <class T, class S>
BN_INLINE void add_to_memory(Part<T> part, const S& sum, double* p) {
  double values[kLanes<Vector<T>>] = {};
  add_to_memory(sum, values);
  for (int64_t i = 0; i < part.n; ++i) p[i] += values[i];
}

// A channel's or several channels' pivots, in the values' type and in float64: the same numbers, being values.
template <class V>
struct Pivot {
  V value;
  Doubles wide[Sum<V>::parts];
};

template <class T, MaskType M>
void moments(const Extents& extents, const void* x, const Mask& any_mask, const double* pivots, int64_t begin,
             int64_t end, Sums sums) {
  const Extents e = extents;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  Mask mask = any_mask;
  mask.type = M;  // known to the compiler
  MaskBuffer buffer;
  // Adds the values of the step at k. What equals the pivot adds nothing, whatever its sample weight.
  const auto add = [&](MomentSums<V>& m, auto access, int64_t k, V value, const Pivot<V>& pivot,
                       const RunMask& local) {
    if constexpr (M == MaskType::none) {
      m.add(value, pivot.wide);
    } else if constexpr (M == MaskType::boolean) {
      m.add(local.counted<V>(access, k) ? value : pivot.value, pivot.wide);
    } else {
      Doubles sample_weight[Sum<V>::parts];
      local.load<V>(access, k, sample_weight);
      m.add(value, pivot.wide, sample_weight);
    }
  };
  if (!e.rows()) {
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      const RunMask local = run_mask(e, mask, at, 1, buffer);
      MomentSums<V> even, odd;  // two, as an addition waits for the one before it
      Pivot<V> pivot;
      pivot.value = splat<V>(pivots[channel]);
      widen(pivot.value, pivot.wide);
      const auto whole = [&](int64_t k) { return Whole<T>::load(x, at + k); };
      int64_t i = 0;
      for (; i + 2 * lanes <= length; i += 2 * lanes) {
        add(even, Whole<T>{}, i, whole(i), pivot, local);
        add(odd, Whole<T>{}, i + lanes, whole(i + lanes), pivot, local);
      }
      if (i + lanes <= length) add(even, Whole<T>{}, i, whole(i), pivot, local), i += lanes;
      if (const int64_t n = length - i; n > 0) {
        if (length < lanes)  // the missing lanes are the pivot
          add(odd, Part<T>{n}, 0, first_lanes(Part<T>{n}.load(x, at), n, pivot.value), pivot, local);
        else  // and so are those that were added before
          add(odd, Whole<T>{}, length - lanes, first_lanes(pivot.value, lanes - n, whole(length - lanes)), pivot,
              local);
      }
      even.add(odd);
      sums.first[channel] += total(even.first), sums.second[channel] += total(even.second);
    });
    return;
  }
  const bool single = packed(e, mask) && kGroup * e.channels > kMaxPackedRow;
  for_each_group(e, begin, end, single, [&](int64_t at, auto rows) {
    const RunMask local = run_mask(e, mask, at, rows.value, buffer);
    for_each_step<T>(e.channels, [&](auto access, int64_t c) {
      MomentSums<V> m;
      Pivot<V> pivot;
      load_doubles(access, pivots + c, pivot.wide);
      pivot.value = narrowed(pivot.wide);
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows.value; ++r)
        add(m, access, c, access.load(x, at + r * e.channels + c), pivot, row_mask(local, e, r));
      add_to_memory(access, m.first, sums.first + c);
      add_to_memory(access, m.second, sums.second + c);
    });
  });
}

template <class T, class A, bool Residual>
void sums(const Extents& extents, const Backward& tensors, const Affine& affine, int64_t begin, int64_t end,
          Sums sums) {
  const Extents e = extents;
  const Backward t = tensors;
  const Affine a = affine;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  if (!e.rows()) {
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      const Broadcast<V> c{channel};
      Sum<V> first, second;
      // Of the values at k, the first `taken` were added before.
      const auto add = [&](V& f, V& s, auto access, int64_t k, int64_t taken) {
        const V x = access.load(t.x, at + k);
        V dz = preactivation_grad<T, A, Residual>(t, a, access, c, at + k, k, x);
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
  for_each_group(e, begin, end, false, [&](int64_t at, auto rows) {
    for_each_step<T>(e.channels, [&](auto access, int64_t c) {
      V f{}, s{};
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows.value; ++r) {
        const int64_t i = at + r * e.channels + c;
        const V x = access.load(t.x, i);
        const V dz = preactivation_grad<T, A, Residual>(t, a, access, coefficients, i, c, x);
        f += dz;
        s += product(t, dz, x - access.coefficient(coefficients, a.mean, c));
      }
      Sum<V> first, second;
      first.add(f);
      second.add(s);
      add_to_memory(access, first, sums.first + c);
      add_to_memory(access, second, sums.second + c);
    });
  });
}

template <class T, class A, bool Residual>
void apply(const Extents& extents, const Forward& tensors, const Affine& affine, int64_t begin, int64_t end) {
  const Extents e = extents;
  const Forward t = tensors;
  const Affine a = affine;
  if (e.rows())
    for (; begin < end; begin += e.channels)
      apply_run<T, A, Residual>(t, a, Elementwise<Vector<T>>{}, begin, e.channels);
  else
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      apply_run<T, A, Residual>(t, a, Broadcast<Vector<T>>{channel}, at, length);
    });
}

template <class T, class A, bool Residual>
void grad(const Extents& extents, const Backward& tensors, const Affine& affine, const GradCoefficients& coefficients,
          int64_t begin, int64_t end) {
  const Extents e = extents;
  const Backward t = tensors;
  const Affine a = affine;
  const GradCoefficients s = coefficients;
  MaskBuffer buffer;
  if (e.rows())
    for (; begin < end; begin += e.channels)
      grad_run<T, A, Residual>(t, a, s, run_mask(e, t.mask, begin, 1, buffer), Elementwise<Vector<T>>{}, begin,
                               e.channels);
  else
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      grad_run<T, A, Residual>(t, a, s, run_mask(e, t.mask, at, 1, buffer), Broadcast<Vector<T>>{channel}, at,
                               length);
    });
}

// --- tables: an instance for every type of mask, and for every activation with and without a residual ----------------

template <class T, class List>
struct Tables;

template <class T, class... A>
struct Tables<T, ActivationList<A...>> {
  // Without an activation, dz is dy: no kernel of the gradient looks at the residual.
  template <class Activation>
  static constexpr bool grad_reads_residual = !std::is_same_v<Activation, Identity>;

  static constexpr decltype(Kernels::moments) moments[] = {
      batchnorm::moments<T, MaskType::none>, batchnorm::moments<T, MaskType::boolean>,
      batchnorm::moments<T, MaskType::float32>, batchnorm::moments<T, MaskType::float64>};
  static constexpr decltype(Kernels::sums) sums[][2] = {
      {batchnorm::sums<T, A, false>, batchnorm::sums<T, A, grad_reads_residual<A>>}...};
  static constexpr decltype(Kernels::apply) apply[][2] = {
      {batchnorm::apply<T, A, false>, batchnorm::apply<T, A, true>}...};
  static constexpr decltype(Kernels::grad) grad[][2] = {
      {batchnorm::grad<T, A, false>, batchnorm::grad<T, A, grad_reads_residual<A>>}...};
};

template <class T>
constexpr Kernels kernels_for = {
    [](const Extents& e, const void* x, const Mask& mask, const double* pivots, int64_t begin, int64_t end, Sums s) {
      Tables<T, Activations>::moments[static_cast<int>(mask.type)](e, x, mask, pivots, begin, end, s);
    },
    [](const Extents& e, const Backward& t, const Affine& a, int64_t begin, int64_t end, Sums s) {
      Tables<T, Activations>::sums[a.activation][t.residual != nullptr](e, t, a, begin, end, s);
    },
    [](const Extents& e, const Forward& t, const Affine& a, int64_t begin, int64_t end) {
      Tables<T, Activations>::apply[a.activation][t.residual != nullptr](e, t, a, begin, end);
    },
    [](const Extents& e, const Backward& t, const Affine& a, const GradCoefficients& g, int64_t begin, int64_t end) {
      Tables<T, Activations>::grad[a.activation][t.residual != nullptr](e, t, a, g, begin, end);
    }};

// In the order of Dtype.
constexpr Kernels kernels[kDtypes] = {kernels_for<float>, kernels_for<double>, kernels_for<BFloat16>,
                                      kernels_for<Float16>};

}  // namespace

#define BN_STRING(name) BN_STRING_OF_VALUE(name)
#define BN_STRING_OF_VALUE(name) #name

namespace BN_LEVEL {

extern const Level level;
const Level level = {BN_STRING(BN_LEVEL), kernels, Activations::names};

}  // namespace BN_LEVEL
}  // namespace batchnorm
