// The kernels' interface: plain pointers, so that nothing of torch or of the standard library is compiled more than once.
//
// An input of any rank and memory order is outer x channels x inner: `outer` blocks of `channels` runs of `inner`
// adjacent values. Contiguous (N, C, *S) is N x C x S; channels_last is (N S) x C x 1. With inner > 1 a channel is a
// sequence of outer runs ("planes"); with inner == 1 it is a column of a matrix ("rows").
#pragma once

#include <cstdint>

namespace batchnorm {

struct Walk {
  int64_t outer, channels, inner;

  int64_t count() const { return outer * inner; }  // values of each channel
};

enum class Activation { none, relu };

// What the normalisation does to one channel, in float32:
//   z = (x - mean) * scale + shift,  mean the float next to the true mean, shift = bias - (true mean - mean) * scale.
// Subtracting the near mean is exact where it matters, so z keeps its precision at |mean| / std of 1e4 and more.
// Arrays of one value for each channel.
struct Affine {
  const float *mean, *scale, *shift;
  Activation activation;
};

// What the input's gradient is: dx = dz * scale + ((x - mean) * slope + offset), the affine's mean and scale.
struct Slopes {
  const float *slope, *offset;
};

// Inputs and outputs of the two directions; residual and dresidual may be null.
struct Forward {
  const float *x, *residual;
  float* y;
};

struct Backward {
  const float *dy, *x, *residual;
  float *dx, *dresidual;
};

// One set of kernels for each instruction set. Ranges are half-open.
struct Kernels {
  const char* name;

  // sums[0] += sum (x - pivot), sums[1] += sum (x - pivot)^2 over the values [begin, end) of one channel.
  void (*plane_moments)(const Walk&, const float* x, int64_t channel, int64_t begin, int64_t end, double pivot,
                        double* sums);
  // The same for the rows [begin, end) of all channels: sums is two arrays of `channels`.
  void (*row_moments)(const Walk&, const float* x, int64_t begin, int64_t end, const float* pivots, double* sums);

  // sums[0] += sum dz, sums[1] += sum dz (x - affine.mean).
  void (*plane_sums)(const Walk&, const Backward&, const Affine&, int64_t channel, int64_t begin, int64_t end,
                     double* sums);
  void (*row_sums)(const Walk&, const Backward&, const Affine&, int64_t begin, int64_t end, double* sums);

  // y = activation(z + residual).
  void (*plane_apply)(const Walk&, const Forward&, const Affine&, int64_t channel, int64_t begin, int64_t end);
  void (*row_apply)(const Walk&, const Forward&, const Affine&, int64_t begin, int64_t end);

  // dx and dresidual.
  void (*plane_grad)(const Walk&, const Backward&, const Affine&, const Slopes&, int64_t channel, int64_t begin,
                     int64_t end);
  void (*row_grad)(const Walk&, const Backward&, const Affine&, const Slopes&, int64_t begin, int64_t end);
};

// The kernels in use: the best that this machine has, unless a level was asked for (levels.cpp).
const Kernels& kernels();

}  // namespace batchnorm
