// The loops, compiled once for each instruction set (BN_LEVEL is its name).
//
// The order of every sum is fixed by the shape and the range that is asked for, never by threads or addresses.
#include "kernels.hpp"

#include "simd.hpp"

namespace {

using batchnorm::Activation;
using batchnorm::Affine;
using batchnorm::Backward;
using batchnorm::Forward;
using batchnorm::Slopes;
using batchnorm::Walk;

// --- per-channel coefficients: one value for a whole run, or one for each value of a row -----------------------------

struct Broadcast {
  int64_t channel;
  BN_INLINE Floats vector(const float* a, int64_t) const { return splat(a[channel]); }
  BN_INLINE float scalar(const float* a, int64_t) const { return a[channel]; }
};

struct Elementwise {
  BN_INLINE Floats vector(const float* a, int64_t i) const { return load<Floats>(a + i); }
  BN_INLINE float scalar(const float* a, int64_t i) const { return a[i]; }
};

// --- arithmetic of one value: the same expressions for vectors, for tails, forward and backward ----------------------

template <class V>
BN_INLINE V affine(V x, V mean, V scale, V shift) {
  return (x - mean) * scale + shift;
}

// NaN stays NaN: the comparison is false for it.
template <Activation A>
BN_INLINE Floats activate(Floats z) {
  return A == Activation::relu ? (z < 0 ? Floats{} : z) : z;
}
template <Activation A>
BN_INLINE float activate(float z) {
  return A == Activation::relu && z < 0 ? 0.0f : z;
}
template <Activation A>
BN_INLINE Floats activate_grad(Floats dy, Floats z) {
  return A == Activation::relu ? (z <= 0 ? Floats{} : dy) : dy;
}
template <Activation A>
BN_INLINE float activate_grad(float dy, float z) {
  return A == Activation::relu && z <= 0 ? 0.0f : dy;
}

// dz at position i; coefficients at k.
template <Activation A, bool Residual, class Coefficients>
BN_INLINE Floats grad_vector(const Backward& t, const Affine& a, Coefficients c, int64_t i, int64_t k, Floats x) {
  Floats dy = loaded(load<Floats>(t.dy + i));
  if (A == Activation::none) return dy;
  Floats z = affine(x, c.vector(a.mean, k), c.vector(a.scale, k), c.vector(a.shift, k));
  if (Residual) z += load<Floats>(t.residual + i);
  return activate_grad<A>(dy, z);
}
template <Activation A, bool Residual, class Coefficients>
BN_INLINE float grad_scalar(const Backward& t, const Affine& a, Coefficients c, int64_t i, int64_t k, float x) {
  float dy = t.dy[i];
  if (A == Activation::none) return dy;
  float z = affine(x, c.scalar(a.mean, k), c.scalar(a.scale, k), c.scalar(a.shift, k));
  if (Residual) z += t.residual[i];
  return activate_grad<A>(dy, z);
}

// --- runs of adjacent values -----------------------------------------------------------------------------------------

template <Activation A, bool Residual, class Coefficients>
BN_INLINE void apply_run(const Forward& t, const Affine& a, Coefficients c, int64_t at, int64_t length, int64_t first) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    int64_t k = first + i;
    Floats z = affine(load<Floats>(t.x + at + i), c.vector(a.mean, k), c.vector(a.scale, k), c.vector(a.shift, k));
    if (Residual) z += load<Floats>(t.residual + at + i);
    store(t.y + at + i, activate<A>(z));
  }
  for (; i < length; ++i) {
    int64_t k = first + i;
    float z = affine(t.x[at + i], c.scalar(a.mean, k), c.scalar(a.scale, k), c.scalar(a.shift, k));
    if (Residual) z += t.residual[at + i];
    t.y[at + i] = activate<A>(z);
  }
}

template <Activation A, bool Residual, class Coefficients>
BN_INLINE void grad_run(const Backward& t, const Affine& a, const Slopes& s, Coefficients c, int64_t at, int64_t length,
                        int64_t first) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    int64_t k = first + i;
    Floats x = load<Floats>(t.x + at + i);
    Floats dz = grad_vector<A, Residual>(t, a, c, at + i, k, x);
    if (Residual && A != Activation::none) store(t.dresidual + at + i, dz);
    Floats rest = affine(x, c.vector(a.mean, k), c.vector(s.slope, k), c.vector(s.offset, k));
    store(t.dx + at + i, dz * c.vector(a.scale, k) + rest);
  }
  for (; i < length; ++i) {
    int64_t k = first + i;
    float x = t.x[at + i];
    float dz = grad_scalar<A, Residual>(t, a, c, at + i, k, x);
    if (Residual && A != Activation::none) t.dresidual[at + i] = dz;
    float rest = affine(x, c.scalar(a.mean, k), c.scalar(s.slope, k), c.scalar(s.offset, k));
    t.dx[at + i] = dz * c.scalar(a.scale, k) + rest;
  }
}

// --- walks -----------------------------------------------------------------------------------------------------------

// The runs that make up the values [begin, end) of one channel: run(offset of the first value, length).
template <class Run>
BN_INLINE void for_each_run(const Walk& w, int64_t channel, int64_t begin, int64_t end, Run run) {
  while (begin < end) {
    int64_t block = begin / w.inner, within = begin % w.inner;
    int64_t length = w.inner - within < end - begin ? w.inner - within : end - begin;
    run((block * w.channels + channel) * w.inner + within, length);
    begin += length;
  }
}

void plane_moments(const Walk& w, const float* x, int64_t channel, int64_t begin, int64_t end, double pivot,
                   double* sums) {
  Doubles first[2] = {}, second[2] = {}, p = splat_double(pivot);
  double tail_first = 0, tail_second = 0;
  for_each_run(w, channel, begin, end, [&](int64_t at, int64_t length) {
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      Wide v = load_wide(x + at + i);
      Doubles low = v.low - p, high = v.high - p;
      first[0] += low, second[0] += low * low;
      first[1] += high, second[1] += high * high;
    }
    for (; i < length; ++i) {
      double d = x[at + i] - pivot;
      tail_first += d, tail_second += d * d;
    }
  });
  sums[0] += sum(first[0] + first[1]) + tail_first;
  sums[1] += sum(second[0] + second[1]) + tail_second;
}

template <Activation A, bool Residual>
void plane_sums_of(const Walk& w, const Backward& t, const Affine& a, int64_t channel, int64_t begin, int64_t end,
                   double* sums) {
  Broadcast c{channel};
  Doubles first[2] = {}, second[2] = {};
  double tail_first = 0, tail_second = 0;
  for_each_run(w, channel, begin, end, [&](int64_t at, int64_t length) {
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      Floats x = load<Floats>(t.x + at + i);
      Floats dz = grad_vector<A, Residual>(t, a, c, at + i, 0, x);
      Wide g = widen(dz), product = widen(dz * (x - c.vector(a.mean, 0)));
      first[0] += g.low, first[1] += g.high;
      second[0] += product.low, second[1] += product.high;
    }
    for (; i < length; ++i) {
      float x = t.x[at + i];
      float dz = grad_scalar<A, Residual>(t, a, c, at + i, 0, x);
      tail_first += dz, tail_second += dz * (x - a.mean[channel]);
    }
  });
  sums[0] += sum(first[0] + first[1]) + tail_first;
  sums[1] += sum(second[0] + second[1]) + tail_second;
}

// Rows are taken in groups, so that the sums of a channel are read and written once for the whole group.
constexpr int64_t kGroup = 8;

template <int64_t N>
struct Rows {
  static constexpr int64_t rows = N;
};

// Calls group(first row, Rows<how many>) for [begin, end).
template <class Group>
BN_INLINE void for_each_group(int64_t begin, int64_t end, Group group) {
  for (; begin + kGroup <= end; begin += kGroup) group(begin, Rows<kGroup>{});
  for (; begin < end; ++begin) group(begin, Rows<1>{});
}

BN_INLINE void accumulate(double* sums, Doubles low, Doubles high) {
  constexpr int64_t half = kLanes / 2;
  store(sums, load<Doubles>(sums) + low);
  store(sums + half, load<Doubles>(sums + half) + high);
}

void row_moments(const Walk& w, const float* x, int64_t begin, int64_t end, const float* pivots, double* sums) {
  double *first = sums, *second = sums + w.channels;
  for_each_group(begin, end, [&](int64_t row, auto group) {
    const float* base = x + row * w.channels;
    int64_t c = 0;
    for (; c + kLanes <= w.channels; c += kLanes) {
      Wide pivot = load_wide(pivots + c);
      Doubles f[2] = {}, s[2] = {};
#pragma GCC unroll 8
      for (int64_t r = 0; r < group.rows; ++r) {
        Wide v = load_wide(base + r * w.channels + c);
        Doubles low = v.low - pivot.low, high = v.high - pivot.high;
        f[0] += low, s[0] += low * low;
        f[1] += high, s[1] += high * high;
      }
      accumulate(first + c, f[0], f[1]);
      accumulate(second + c, s[0], s[1]);
    }
    for (; c < w.channels; ++c) {
      double f = 0, s = 0, pivot = pivots[c];
      for (int64_t r = 0; r < group.rows; ++r) {
        double d = base[r * w.channels + c] - pivot;
        f += d, s += d * d;
      }
      first[c] += f, second[c] += s;
    }
  });
}

template <Activation A, bool Residual>
void row_sums_of(const Walk& w, const Backward& t, const Affine& a, int64_t begin, int64_t end, double* sums) {
  double *first = sums, *second = sums + w.channels;
  for_each_group(begin, end, [&](int64_t row, auto group) {
    const int64_t base = row * w.channels;
    int64_t c = 0;
    for (; c + kLanes <= w.channels; c += kLanes) {
      Doubles f[2] = {}, s[2] = {};
#pragma GCC unroll 8
      for (int64_t r = 0; r < group.rows; ++r) {
        const int64_t at = base + r * w.channels + c;
        Floats x = load<Floats>(t.x + at);
        Floats dz = grad_vector<A, Residual>(t, a, Elementwise{}, at, c, x);
        Wide g = widen(dz), product = widen(dz * (x - load<Floats>(a.mean + c)));
        f[0] += g.low, f[1] += g.high;
        s[0] += product.low, s[1] += product.high;
      }
      accumulate(first + c, f[0], f[1]);
      accumulate(second + c, s[0], s[1]);
    }
    for (; c < w.channels; ++c) {
      double f = 0, s = 0;
      for (int64_t r = 0; r < group.rows; ++r) {
        const int64_t at = base + r * w.channels + c;
        float dz = grad_scalar<A, Residual>(t, a, Elementwise{}, at, c, t.x[at]);
        f += dz, s += dz * (t.x[at] - a.mean[c]);
      }
      first[c] += f, second[c] += s;
    }
  });
}

template <Activation A, bool Residual>
void plane_apply_of(const Walk& w, const Forward& t, const Affine& a, int64_t channel, int64_t begin, int64_t end) {
  for_each_run(w, channel, begin, end, [&](int64_t at, int64_t length) {
    apply_run<A, Residual>(t, a, Broadcast{channel}, at, length, 0);
  });
}

template <Activation A, bool Residual>
void row_apply_of(const Walk& w, const Forward& t, const Affine& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    apply_run<A, Residual>(t, a, Elementwise{}, row * w.channels, w.channels, 0);
}

template <Activation A, bool Residual>
void plane_grad_of(const Walk& w, const Backward& t, const Affine& a, const Slopes& s, int64_t channel, int64_t begin,
                   int64_t end) {
  for_each_run(w, channel, begin, end, [&](int64_t at, int64_t length) {
    grad_run<A, Residual>(t, a, s, Broadcast{channel}, at, length, 0);
  });
}

template <Activation A, bool Residual>
void row_grad_of(const Walk& w, const Backward& t, const Affine& a, const Slopes& s, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    grad_run<A, Residual>(t, a, s, Elementwise{}, row * w.channels, w.channels, 0);
}

// Calls the instance of `kernel` for an activation and the presence of a residual.
#define BN_DISPATCH(kernel, activation, residual, ...)               \
  switch (activation) {                                              \
    case Activation::none:                                           \
      residual ? kernel<Activation::none, true>(__VA_ARGS__)         \
               : kernel<Activation::none, false>(__VA_ARGS__);       \
      break;                                                         \
    case Activation::relu:                                           \
      residual ? kernel<Activation::relu, true>(__VA_ARGS__)         \
               : kernel<Activation::relu, false>(__VA_ARGS__);       \
      break;                                                         \
  }

void plane_sums(const Walk& w, const Backward& t, const Affine& a, int64_t channel, int64_t begin, int64_t end,
                double* sums) {
  BN_DISPATCH(plane_sums_of, a.activation, t.residual, w, t, a, channel, begin, end, sums)
}
void row_sums(const Walk& w, const Backward& t, const Affine& a, int64_t begin, int64_t end, double* sums) {
  BN_DISPATCH(row_sums_of, a.activation, t.residual, w, t, a, begin, end, sums)
}
void plane_apply(const Walk& w, const Forward& t, const Affine& a, int64_t channel, int64_t begin, int64_t end) {
  BN_DISPATCH(plane_apply_of, a.activation, t.residual, w, t, a, channel, begin, end)
}
void row_apply(const Walk& w, const Forward& t, const Affine& a, int64_t begin, int64_t end) {
  BN_DISPATCH(row_apply_of, a.activation, t.residual, w, t, a, begin, end)
}
void plane_grad(const Walk& w, const Backward& t, const Affine& a, const Slopes& s, int64_t channel, int64_t begin,
                int64_t end) {
  BN_DISPATCH(plane_grad_of, a.activation, t.residual, w, t, a, s, channel, begin, end)
}
void row_grad(const Walk& w, const Backward& t, const Affine& a, const Slopes& s, int64_t begin, int64_t end) {
  BN_DISPATCH(row_grad_of, a.activation, t.residual, w, t, a, s, begin, end)
}

}  // namespace

#define BN_TEXT_OF(x) #x
#define BN_TEXT(x) BN_TEXT_OF(x)

namespace batchnorm::BN_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {BN_TEXT(BN_LEVEL), plane_moments, row_moments, plane_sums, row_sums,
                         plane_apply,       row_apply,     plane_grad,  row_grad};

}  // namespace batchnorm::BN_LEVEL
