// The loops, compiled once for each instruction set (BN_LEVEL is its name).
//
// The order of every sum is fixed by the shape and the range that is asked for, never by threads or addresses.
#include "loops/kernels.hpp"

#include <type_traits>

#include "loops/activations.hpp"
#include "loops/ranges.hpp"
#include "loops/run_mask.hpp"
#include "loops/simd.hpp"
#include "loops/steps.hpp"
#include "loops/sums.hpp"

namespace batchnorm {
namespace {

// --- activations in loops ---------------------------------------------------------------------------------------------

// Whether a loop has the activation inlined. The ends of runs, which are many places and few values, call what is not
// brief. So does float64: it calls the standard library for each lane as it is.
template <class A, class Access, class V>
constexpr bool inlined = A::brief || (Access::whole && sizeof(Scalar<V>) == sizeof(float));

template <class A, class V>
__attribute__((noinline)) V called_value(A activation, V z) {
  return activation.value(z);
}

template <class A, class V>
__attribute__((noinline)) V called_grad(A activation, V dy, V z) {
  return activation.grad(dy, z);
}

template <class A, class Access, class V>
BN_INLINE V value(A activation, Access, V z) {
  if constexpr (inlined<A, Access, V>)
    return activation.value(z);
  else
    return called_value(activation, z);
}

template <class A, class Access, class V>
BN_INLINE V grad(A activation, Access, V dy, V z) {
  if constexpr (inlined<A, Access, V>)
    return activation.grad(dy, z);
  else
    return called_grad(activation, dy, z);
}

// --- runs ------------------------------------------------------------------------------------------------------------

// dz of the values at i, which are x, with the coefficients at k. Where a vector is partial its other lanes are 0.
template <class T, class A, class Access, class C>
BN_INLINE Vector<T> preactivation_grad(const Backward& t, A activation, Access access, const C& c, int64_t i, int64_t k,
                                       Vector<T> x) {
  const Vector<T> dy = loaded(access.load(t.dy, i));
  if constexpr (std::is_same_v<A, Identity>) return dy;
  const Vector<T> mean = access.coefficient(c.mean, k);
  if (t.mask) x = dy != 0 ? x : mean;  // padding, which may be NaN
  Vector<T> z = affine(x, mean, access.coefficient(c.scale, k), access.coefficient(c.shift, k));
  if (t.residual) z += access.load(t.residual, i);
  return grad(activation, access, dy, z);
}

// dz (x - mean); with a mask, padding whose gradient is 0 adds nothing whatever it holds.
template <class V>
BN_INLINE V product(const Backward& t, V dz, V deviation) {
  const V p = dz * deviation;
  return t.mask ? (dz != 0 ? p : V{}) : p;
}

template <class T, class A, class C>
BN_INLINE void apply_run(const Forward& t, A activation, const C& c, int64_t at, int64_t length) {
  for_each_overlapping_step<T>(
      length, unaligned_head<T>(t.y, at, length, t.stream),
      [&](auto access, int64_t k) { return access.load(t.x, at + k); },
      [&](auto access, int64_t k, Vector<T> x) {
        Vector<T> z = affine(x, access.coefficient(c.mean, k), access.coefficient(c.scale, k),
                             access.coefficient(c.shift, k));
        if (t.residual) z += access.load(t.residual, at + k);
        access.store(t.y, at + k, value(activation, access, z), t.stream);
      });
}

template <class T, class A, class C>
BN_INLINE void grad_run(const Backward& t, A activation, bool constants, RunMask mask, const C& c, int64_t at,
                        int64_t length) {
  using V = Vector<T>;
  for_each_overlapping_step<T>(
      length, unaligned_head<T>(t.dx, at, length, t.stream),
      [&](auto access, int64_t k) { return access.load(t.x, at + k); },
      [&](auto access, int64_t k, V x) {
        const V dz = preactivation_grad<T>(t, activation, access, c, at + k, k, x);
        if (t.dresidual) access.store(t.dresidual, at + k, dz, t.stream);
        V dx = dz * access.coefficient(c.scale, k);
        if (!constants) {
          V rest = affine(x, access.coefficient(c.mean, k), access.coefficient(c.slope, k),
                          access.coefficient(c.offset, k));
          if (t.mask) rest = mask.times(access, k, rest);
          dx += rest;
        }
        access.store(t.dx, at + k, dx, t.stream);
      });
}

// --- the kernels, over ranges ----------------------------------------------------------------------------------------

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

// Kinds of masks that moments have loops for.
struct NoMask {};
struct BooleanMask {};
struct SampleWeights {};

template <class T, class M>
void moments(const Extents& extents, const void* x, const Mask& mask, const double* pivots, int64_t begin,
             int64_t end, Sums sums) {
  const Extents e = extents;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  // Half precision is added up in float32 for a few steps: widening every difference would take longer than reading it.
  constexpr bool narrow = sizeof(T) < sizeof(float) && std::is_same_v<M, NoMask>;
  constexpr int64_t together = 2 * kGroup * lanes;
  using Few = std::conditional_t<narrow, FewMomentSums<V>, MomentSums<V>>;
  MaskBuffer buffer;
  // Adds the values of the step at k. What equals the pivot adds nothing, whatever its sample weight.
  const auto add = [&](Few& m, auto access, int64_t k, V value, const Pivot<V>& pivot, const RunMask& local) {
    if constexpr (narrow) {
      m.add(value, pivot.value);
    } else if constexpr (std::is_same_v<M, NoMask>) {
      m.add(value, pivot.wide);
    } else if constexpr (std::is_same_v<M, BooleanMask>) {
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
      MomentSums<V> all;
      Few even, odd;  // two, as an addition waits for the one before it
      Pivot<V> pivot;
      pivot.value = splat<V>(pivots[channel]);
      widen(pivot.value, pivot.wide);
      const auto whole = [&](int64_t k) { return Whole<T>::load(x, at + k); };
      int64_t i = 0;
      if constexpr (narrow) {
        for (; i + together <= length; all.add(even, odd), even = odd = {})
          for (const int64_t end = i + together; i < end; i += 2 * lanes) {
            add(even, Whole<T>{}, i, whole(i), pivot, local);
            add(odd, Whole<T>{}, i + lanes, whole(i + lanes), pivot, local);
          }
      }
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
      all.add(even, odd);
      sums.first[channel] += total(all.first), sums.second[channel] += total(all.second);
    });
    return;
  }
  const int64_t ahead = ahead_by<T>(e);
  const bool single = packed(e, mask) && kGroup * e.channels > kMaxPackedRow;
  for_each_group(e, begin, end, single, [&](int64_t at, auto rows) {
    const RunMask local = run_mask(e, mask, at, rows.value, buffer);
    for_each_step<T>(e.channels, [&](auto access, int64_t c) {
      MomentSums<V> all;
      Few m;
      Pivot<V> pivot;
      load_doubles(access, pivots + c, pivot.wide);
      pivot.value = narrowed(pivot.wide);
      for_each_row<true>(access, rows, [&](int64_t r) {
        const int64_t i = at + r * e.channels + c;
        prefetch<T>(x, i + ahead);
        add(m, access, c, access.load(x, i), pivot, row_mask(local, e, r));
      });
      all.add(m);
      add_to_memory(access, all.first, sums.first + c);
      add_to_memory(access, all.second, sums.second + c);
    });
  });
}

template <class T, class A>
void sums(const Extents& extents, const Backward& tensors, const Affine& affine, A activation, int64_t begin, int64_t end,
          Sums sums) {
  const Extents e = extents;
  const Backward t = tensors;
  const Affine a = affine;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<V>;
  if (!e.rows()) {
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      const Normalizing<OfRun<V>> c(a, channel);
      Sum<V> first, second;
      // Of the values at k, the first `taken` were added before.
      const auto add = [&](V& f, V& s, auto access, int64_t k, int64_t taken) {
        const V x = access.load(t.x, at + k);
        V dz = preactivation_grad<T>(t, activation, access, c, at + k, k, x);
        if (taken > 0) dz = first_lanes(V{}, taken, dz);
        f += dz;
        s += product(t, dz, x - c.mean(0));
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
  const Normalizing<OfRow<V>> coefficients(a, 0);
  const int64_t ahead = ahead_by<T>(e);
  for_each_group(e, begin, end, false, [&](int64_t at, auto rows) {
    for_each_step<T>(e.channels, [&](auto access, int64_t c) {
      V f{}, s{};
      const auto add = [&](int64_t r) {
        const int64_t i = at + r * e.channels + c;
        prefetch<T>(t.x, i + ahead);
        prefetch<T>(t.dy, i + ahead);
        const V x = access.load(t.x, i);
        const V dz = preactivation_grad<T>(t, activation, access, coefficients, i, c, x);
        f += dz;
        s += product(t, dz, x - access.coefficient(coefficients.mean, c));
      };
      for_each_row<A::brief>(access, rows, add);
      Sum<V> first, second;
      first.add(f);
      second.add(s);
      add_to_memory(access, first, sums.first + c);
      add_to_memory(access, second, sums.second + c);
    });
  });
}

template <class T, class A>
void apply(const Extents& extents, const Forward& tensors, const Affine& affine, A activation, int64_t begin, int64_t end) {
  const Extents e = extents;
  const Forward t = tensors;
  const Affine a = affine;
  if (e.rows())
    for (; begin < end; begin += e.channels)
      apply_run<T>(t, activation, Normalizing<OfRow<Vector<T>>>(a, 0), begin, e.channels);
  else
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      apply_run<T>(t, activation, Normalizing<OfRun<Vector<T>>>(a, channel), at, length);
    });
}

template <class T, class A>
void grad(const Extents& extents, const Backward& tensors, const Affine& affine, A activation,
          const GradCoefficients& coefficients, int64_t begin, int64_t end) {
  const Extents e = extents;
  const Backward t = tensors;
  const Affine a = affine;
  const GradCoefficients g = coefficients;
  MaskBuffer buffer;
  if (e.rows())
    for (const Differentiating<OfRow<Vector<T>>> c(a, g, 0); begin < end; begin += e.channels)
      grad_run<T>(t, activation, g.constants, run_mask(e, t.mask, begin, 1, buffer), c, begin, e.channels);
  else
    for_each_run(e, begin, end, [&](int64_t channel, int64_t at, int64_t length) {
      grad_run<T>(t, activation, g.constants, run_mask(e, t.mask, at, 1, buffer),
                  Differentiating<OfRun<Vector<T>>>(a, g, channel), at, length);
    });
}

// --- the kernels of a dtype ------------------------------------------------------------------------------------------

// Each domain's part of a range is a range of its own, with that domain's row of the tables.
template <class T>
constexpr Kernels kernels_for = {
    [](const Extents& e, const void* x, const Mask& mask, const double* pivots, int64_t begin, int64_t end, Sums s) {
      for_each_domain(e, begin, end, [&](int64_t row, int64_t first, int64_t last) {
        const double* p = pivots + row;
        if (mask.type == MaskType::none)
          moments<T, NoMask>(e, x, mask, p, first, last, from(s, row));
        else if (mask.type == MaskType::boolean)
          moments<T, BooleanMask>(e, x, mask, p, first, last, from(s, row));
        else
          moments<T, SampleWeights>(e, x, mask, p, first, last, from(s, row));
      });
    },
    [](const Extents& e, const Backward& t, const Affine& a, int64_t begin, int64_t end, Sums s) {
      for_each_domain(e, begin, end, [&](int64_t row, int64_t first, int64_t last) {
        for_activation<T>(a.activation, [&](auto activation) {
          sums<T>(e, t, from(a, row), activation, first, last, from(s, row));
        });
      });
    },
    [](const Extents& e, const Forward& t, const Affine& a, int64_t begin, int64_t end) {
      for_each_domain(e, begin, end, [&](int64_t row, int64_t first, int64_t last) {
        for_activation<T>(a.activation,
                          [&](auto activation) { apply<T>(e, t, from(a, row), activation, first, last); });
      });
    },
    [](const Extents& e, const Backward& t, const Affine& a, const GradCoefficients& g, int64_t begin, int64_t end) {
      for_each_domain(e, begin, end, [&](int64_t row, int64_t first, int64_t last) {
        for_activation<T>(a.activation, [&](auto activation) {
          grad<T>(e, t, from(a, row), activation, from(g, row), first, last);
        });
      });
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
