// The interface between the loops, compiled once for each instruction set, and what calls them: plain pointers, so that
// nothing of torch or of the standard library is compiled more than once.
//
// An input of any rank and memory order is outer x channels x inner: `outer` blocks of `channels` runs of `inner`
// adjacent values. Contiguous (N, C, *S) is N x C x S; channels_last is (N S) x C x 1. With inner > 1 the input is a
// sequence of runs of one channel each ("planes"); with inner == 1 it is a matrix with a column for each channel
// ("rows"). Kernels work on a range [begin, end) of adjacent values: of planes any range, of rows whole rows.
#pragma once

#include <cstdint>

// Always inlined: of a function that is compiled for several instruction sets the linker would keep any one.
#define BN_INLINE inline __attribute__((always_inline))

namespace batchnorm {

struct Extents {
  int64_t outer, channels, inner;
  // Of an input whose samples come from several domains, the domain of each sample, and the values of a sample, which
  // then are adjacent. Whatever has one entry for each channel has as many rows of `channels` entries as domains.
  const int64_t* domains = nullptr;
  int64_t sample = 0;

  BN_INLINE int64_t count() const { return outer * inner; }  // values of each channel
  BN_INLINE int64_t size() const { return outer * channels * inner; }
  BN_INLINE bool rows() const { return inner == 1; }
};

enum class Dtype { float32, float64, bfloat16, float16 };
constexpr int kDtypes = 4;

// One value for each channel: exact, and rounded to what float32 and half-precision inputs are computed in.
struct PerChannel {
  const double* exact;
  const float* rounded;
};

// What the normalization does to one channel:
//   z = (x - mean) * scale + shift,  mean the float next to the true mean, shift = bias - (true mean - mean) * scale.
// Subtracting the rounded mean is exact where it matters, so z keeps its precision at |mean| / std of 1e4 and more.
struct Affine {
  PerChannel mean, scale, shift;
  int activation;  // an index of Level::activations
};

// The input's gradient: dx = dz * scale + mask * ((x - mean) * slope + offset), with the affine's mean and scale. Where
// the statistics are constants, dx = dz * scale, whatever x is, infinity included.
struct GradCoefficients {
  PerChannel slope, offset;
  bool constants;
};

// What a mask holds: booleans, a byte each, or sample weights.
enum class MaskType { none, boolean, float32, float64 };

BN_INLINE int64_t size_of(MaskType type) {
  return type == MaskType::float64 ? 8 : type == MaskType::float32 ? 4 : 1;
}

// How much each of the outer x inner positions counts, in the order in which they lie in memory. None: all count 1.
struct Mask {
  MaskType type = MaskType::none;
  const void* values = nullptr;
  int64_t channels = 0;  // of a position; packed rows have a multiple of it

  BN_INLINE explicit operator bool() const { return type != MaskType::none; }
};

constexpr int64_t kMaxPackedRow = 1 << 12;  // values: no row that was packed from several is longer

// Inputs and outputs of the two directions, all of one dtype; residual and dresidual may be null. `stream`: outputs go
// past the caches.
struct Forward {
  const void *x, *residual;
  void* y;
  bool stream;
};

struct Backward {
  const void *dy, *x, *residual;
  void *dx, *dresidual;
  bool stream;
  Mask mask;
};

// Two sums for each channel.
struct Sums {
  double *first, *second;
};

// The tables from a row on.
BN_INLINE PerChannel from(const PerChannel& v, int64_t row) {
  return {v.exact ? v.exact + row : nullptr, v.rounded ? v.rounded + row : nullptr};
}

BN_INLINE Affine from(const Affine& a, int64_t row) {
  return {from(a.mean, row), from(a.scale, row), from(a.shift, row), a.activation};
}

BN_INLINE GradCoefficients from(const GradCoefficients& g, int64_t row) {
  return {from(g.slope, row), from(g.offset, row), g.constants};
}

BN_INLINE Sums from(const Sums& s, int64_t row) { return {s.first + row, s.second + row}; }

// The kernels for one dtype.
struct Kernels {
  // first += sum w (x - pivot), second += sum w (x - pivot)^2 with the mask's w. Where w is 0, x may be anything.
  void (*moments)(const Extents&, const void* x, const Mask&, const double* pivots, int64_t begin, int64_t end, Sums);
  // first += sum dz, second += sum dz (x - affine.mean). With a mask, x may be anything where dy is 0.
  void (*sums)(const Extents&, const Backward&, const Affine&, int64_t begin, int64_t end, Sums);
  // y = activation(z + residual).
  void (*apply)(const Extents&, const Forward&, const Affine&, int64_t begin, int64_t end);
  // dx and dresidual.
  void (*grad)(const Extents&, const Backward&, const Affine&, const GradCoefficients&, int64_t begin, int64_t end);
};

// What is compiled for one instruction set.
struct Level {
  const char* name;
  const Kernels* kernels;          // in the order of Dtype
  const char* const* activations;  // their names, then a null pointer; the first is "", no activation
};

}  // namespace batchnorm
