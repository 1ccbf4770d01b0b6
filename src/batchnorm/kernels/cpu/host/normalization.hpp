// The numbers that the loops use, one for each channel, from statistics, weight and bias.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "host/domains.hpp"
#include "host/levels.hpp"
#include "host/strings.hpp"
#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// An operator's `str? activation`.
using OptionalString = std::optional<StringHandle>;

// The index of an activation, from its name; 0 without one.
int take_activation(const OptionalString& argument) {
  if (!argument) return 0;
  const std::string name = take_string(*argument);
  const int index = find_activation(name);
  if (index <= 0) refuse("got activation '", name, "'; there is no native kernel for it");
  return index;
}

// One value for each channel, of each domain, as the kernels read it: repeated for packed rows, and rounded unless x is
// float64.
class Coefficient {
 public:
  Coefficient(const Input& input, const Domains& domains, int64_t repeat)
      : channels_(input.extents.channels),
        width_(channels_ * repeat),
        one_(domains.number == 1),
        exact_(input.dtype == Dtype::float64 ? width_ * domains.number : 0),
        rounded_(input.dtype == Dtype::float64 ? 0 : width_ * domains.number) {}

  // A finite value stays so: a scale beyond float32 would make NaN of the zeros that it is multiplied with. Of NaNs there
  // is one, which loops can round to bfloat16 like any other value.
  void set(int64_t c, double value) {
    constexpr double largest = std::numeric_limits<float>::max();
    if (std::isnan(value)) value = std::numeric_limits<double>::quiet_NaN();
    if (exact_.empty() && std::isfinite(value)) value = std::clamp(value, -largest, largest);
    const int64_t row = one_ || width_ == channels_ ? 0 : c / channels_;  // a division takes longer than the rest
    const int64_t end = width_ == channels_ ? c + 1 : (row + 1) * width_;
    c += row * (width_ - channels_);
    if (exact_.empty())
      for (int64_t i = c; i < end; i += channels_) rounded_[i] = static_cast<float>(value);
    else
      for (int64_t i = c; i < end; i += channels_) exact_[i] = value;
  }

  PerChannel view() const { return {exact_.data(), rounded_.data()}; }

 private:
  int64_t channels_, width_;
  bool one_;
  std::vector<double> exact_;
  std::vector<float> rounded_;
};

// The normalization of all channels, of each domain, in the numbers that the kernels use.
class Normalization {
 public:
  Normalization(const Input& input, const Domains& domains, int64_t repeat, const OptionalTensor& weight,
                const OptionalTensor& bias, double eps, int activation)
      : domains_(domains),
        channels_(input.extents.channels),
        wide_(input.dtype == Dtype::float64),
        weight_(read_table(weight, domains, channels_, "weight", 1)),
        bias_(read_table(bias, domains, channels_, "bias", 0)),
        eps_(eps),
        activation_(activation),
        invstd_(weight_.size()),
        mean_error_(weight_.size()),
        mean_(input, domains, repeat),
        scale_(input, domains, repeat),
        shift_(input, domains, repeat) {}

  void set(int64_t c, double mean, double var) {
    const double rounded = wide_ ? mean : static_cast<float>(mean);
    invstd_[c] = 1 / std::sqrt(var + eps_);
    mean_error_[c] = mean - rounded;
    mean_.set(c, rounded);
    scale_.set(c, weight_[c] * invstd_[c]);
    shift_.set(c, bias_[c] - mean_error_[c] * (weight_[c] * invstd_[c]));
  }

  // The variance is m2 over the domain's count; without counts, m2 is the variance itself.
  void set_all(const Tensor& mean, const Tensor& m2, const std::vector<double>& counts = {}) {
    const auto means = read_table(mean, domains_, channels_, "mean");
    const auto m2s = read_table(m2, domains_, channels_, "variance");
    for (int64_t d = 0, c = 0; d < domains_.number; ++d)
      for (const int64_t end = c + channels_; c < end; ++c) set(c, means[c], counts.empty() ? m2s[c] : m2s[c] / counts[d]);
  }

  Affine affine() const { return {mean_.view(), scale_.view(), shift_.view(), activation_}; }

  // From sum dz (x - rounded mean) to sum dz x_hat.
  double normalized_sum(int64_t c, double sum_dz, double sum_dz_x) const {
    return (sum_dz_x - mean_error_[c] * sum_dz) * invstd_[c];
  }

  // The coefficients of the input's gradient.
  void set_grad(int64_t c, double mean_dz, double mean_dz_xhat, Coefficient& slope, Coefficient& offset) const {
    const double scale = weight_[c] * invstd_[c], exact = -scale * invstd_[c] * mean_dz_xhat;
    slope.set(c, exact);
    offset.set(c, -scale * mean_dz - mean_error_[c] * exact);
  }

 private:
  const Domains& domains_;
  int64_t channels_;
  bool wide_;
  std::vector<double> weight_, bias_;
  double eps_;
  int activation_;
  std::vector<double> invstd_, mean_error_;
  Coefficient mean_, scale_, shift_;
};

}  // namespace
}  // namespace batchnorm
