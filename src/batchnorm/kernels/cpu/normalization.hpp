// The numbers that the loops use, one for each channel, from statistics, weight and bias.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "tensors.hpp"

namespace batchnorm {
namespace {

using OptionalString = std::optional<std::string>;

Activation activation_of(const OptionalString& name) {
  static constexpr std::pair<const char*, Activation> names[] = {
      {"relu", Activation::relu}, {"leaky_relu", Activation::leaky_relu}, {"silu", Activation::silu},
      {"gelu", Activation::gelu}, {"hardswish", Activation::hardswish},   {"elu", Activation::elu}};
  if (!name) return Activation::none;
  for (const auto& [known, activation] : names)
    if (*name == known) return activation;
  STD_TORCH_CHECK(false, "batchnorm: no native kernel for the activation ", *name);
}

// One value for each channel, as the kernels read it: repeated for joined rows, and rounded unless x is float64.
class Coefficient {
 public:
  Coefficient(const Input& input, int64_t repeat)
      : channels_(input.walk.channels),
        size_(channels_ * repeat),
        exact_(input.dtype == Dtype::float64 ? size_ : 0),
        rounded_(input.dtype == Dtype::float64 ? 0 : size_) {}

  void set(int64_t c, double value) {
    if (exact_.empty())
      for (int64_t i = c; i < size_; i += channels_) rounded_[i] = static_cast<float>(value);
    else
      for (int64_t i = c; i < size_; i += channels_) exact_[i] = value;
  }

  PerChannel view() const { return {exact_.data(), rounded_.data()}; }

 private:
  int64_t channels_, size_;
  std::vector<double> exact_;
  std::vector<float> rounded_;
};

// The normalisation of all channels, in the numbers that the kernels use.
class Normalization {
 public:
  Normalization(const Input& input, int64_t repeat, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                const OptionalString& activation)
      : wide_(input.dtype == Dtype::float64),
        weight_(read(weight, input.walk.channels, "weight", 1)),
        bias_(read(bias, input.walk.channels, "bias", 0)),
        eps_(eps),
        activation_(activation_of(activation)),
        invstd_(input.walk.channels),
        low_(input.walk.channels),
        mean_(input, repeat),
        scale_(input, repeat),
        shift_(input, repeat) {}

  void set(int64_t c, double mean, double var) {
    const double near = wide_ ? mean : static_cast<float>(mean);
    invstd_[c] = 1 / std::sqrt(var + eps_);
    low_[c] = mean - near;
    mean_.set(c, near);
    scale_.set(c, weight_[c] * invstd_[c]);
    shift_.set(c, bias_[c] - low_[c] * (weight_[c] * invstd_[c]));
  }

  // The variance is spread / divisor.
  void set_all(const Tensor& mean, const Tensor& spread, double divisor = 1) {
    const auto means = read(mean, invstd_.size(), "mean"), spreads = read(spread, invstd_.size(), "variance");
    for (size_t c = 0; c < means.size(); ++c) set(c, means[c], spreads[c] / divisor);
  }

  Affine affine() const { return {mean_.view(), scale_.view(), shift_.view(), activation_}; }

  // From sum dz (x - near mean) to sum dz x_hat.
  double normalized_sum(int64_t c, double sum_dz, double sum_dz_x) const {
    return (sum_dz_x - low_[c] * sum_dz) * invstd_[c];
  }

  // The coefficients of the input's gradient.
  void set_slope(int64_t c, double mean_dz, double mean_dz_xhat, Coefficient& slope, Coefficient& offset) const {
    const double scale = weight_[c] * invstd_[c], exact = -scale * invstd_[c] * mean_dz_xhat;
    slope.set(c, exact);
    offset.set(c, -scale * mean_dz - low_[c] * exact);
  }

 private:
  bool wide_;
  std::vector<double> weight_, bias_;
  double eps_;
  Activation activation_;
  std::vector<double> invstd_, low_;
  Coefficient mean_, scale_, shift_;
};

}  // namespace
}  // namespace batchnorm
