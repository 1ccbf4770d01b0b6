// The kernels' interface: plain pointers, so that nothing of torch or of the standard library is compiled more than once.
//
// An input of any rank and memory order is outer x channels x inner: `outer` blocks of `channels` runs of `inner`
// adjacent values. Contiguous (N, C, *S) is N x C x S; channels_last is (N S) x C x 1. With inner > 1 the input is a
// sequence of runs of one channel each ("planes"); with inner == 1 it is a matrix with a column for each channel
// ("rows"). Kernels work on a range [begin, end) of adjacent values: of planes any range, of rows whole rows.
#pragma once

#include <cstdint>

namespace batchnorm {

struct Walk {
  int64_t outer, channels, inner;

  int64_t count() const { return outer * inner; }  // values of each channel
  int64_t size() const { return outer * channels * inner; }
  bool rows() const { return inner == 1; }
};

enum class Activation { none, relu, leaky_relu, silu, gelu, hardswish, elu };
enum class Dtype { float32, float64, bfloat16, float16 };

// One value for each channel: exact, and rounded to what float32 and half-precision inputs are computed in.
struct PerChannel {
  const double* exact;
  const float* rounded;
};

// What the normalisation does to one channel:
//   z = (x - mean) * scale + shift,  mean the float next to the true mean, shift = bias - (true mean - mean) * scale.
// Subtracting the near mean is exact where it matters, so z keeps its precision at |mean| / std of 1e4 and more.
struct Affine {
  PerChannel mean, scale, shift;
  Activation activation;
};

// What the input's gradient is: dx = dz * scale + weight * ((x - mean) * slope + offset), the affine's mean and scale.
struct Slopes {
  PerChannel slope, offset;
};

// What a weight is kept as; a boolean is a byte, and counts 1 where it is not 0.
enum class WeightType { none, boolean, float32, float64 };

// How much each of the outer x inner positions counts, in the order in which they lie in memory. None: all count 1. A
// row of more channels than a position has was joined from several positions.
struct Weights {
  WeightType type = WeightType::none;
  const void* values = nullptr;
  int64_t channels = 0;  // of a position

  explicit operator bool() const { return type != WeightType::none; }
};

constexpr int64_t kWidestJoined = 1 << 12;  // values: no joined row is longer

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
  Weights weights;
};

// Two sums for each channel.
struct Sums {
  double *first, *second;
};

// One set of kernels for each instruction set and dtype.
struct Kernels {
  // first += sum weight (x - pivot), second += sum weight (x - pivot)^2. What has no weight may be anything.
  void (*moments)(const Walk&, const void* x, Weights, const double* pivots, int64_t begin, int64_t end, Sums);
  // first += sum dz, second += sum dz (x - affine.mean). With weights, x may be anything where dy is 0.
  void (*sums)(const Walk&, const Backward&, const Affine&, int64_t begin, int64_t end, Sums);
  // y = activation(z + residual).
  void (*apply)(const Walk&, const Forward&, const Affine&, int64_t begin, int64_t end);
  // dx and dresidual.
  void (*grad)(const Walk&, const Backward&, const Affine&, const Slopes&, int64_t begin, int64_t end);
};

// The kernels in use: of the best instruction set that this machine has, unless one was asked for (levels.cpp).
const Kernels& kernels(Dtype dtype);

}  // namespace batchnorm
