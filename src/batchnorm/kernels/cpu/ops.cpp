// The six operations on torch's tensors. What each means is written in kernels/reference.py, the schemas are in ops.py,
// the loops in kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.hpp"
#include "schedule.hpp"
#include "tensors.hpp"

namespace batchnorm {
namespace {

using OptionalString = std::optional<std::string>;

Activation activation_of(const OptionalString& name) {
  if (!name) return Activation::none;
  STD_TORCH_CHECK(*name == "relu", "batchnorm: no native kernel for the activation ", *name);
  return Activation::relu;
}

// The normalisation of all channels, in the numbers that the kernels use.
class Normalization {
 public:
  Normalization(int64_t channels, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                const OptionalString& activation)
      : weight_(read(weight, channels, "weight", 1)),
        bias_(read(bias, channels, "bias", 0)),
        eps_(eps),
        activation_(activation_of(activation)),
        invstd_(channels),
        low_(channels),
        mean_(channels),
        scale_(channels),
        shift_(channels) {}

  void set(int64_t c, double mean, double var) {
    invstd_[c] = 1 / std::sqrt(var + eps_);
    mean_[c] = static_cast<float>(mean);
    low_[c] = mean - mean_[c];
    const double scale = weight_[c] * invstd_[c];
    scale_[c] = static_cast<float>(scale);
    shift_[c] = static_cast<float>(bias_[c] - low_[c] * scale);
  }

  void set_all(const Tensor& mean, const Tensor& var) {
    const auto means = read(mean, invstd_.size(), "mean"), vars = read(var, invstd_.size(), "var");
    for (size_t c = 0; c < means.size(); ++c) set(c, means[c], vars[c]);
  }

  Affine affine() const { return {mean_.data(), scale_.data(), shift_.data(), activation_}; }

  // From sum dz (x - near mean) to sum dz x_hat.
  double normalized_sum(int64_t c, double sum_dz, double sum_dz_x) const {
    return (sum_dz_x - low_[c] * sum_dz) * invstd_[c];
  }

  void slope(int64_t c, double mean_dz, double mean_dz_xhat, float& slope, float& offset) const {
    const double scale = weight_[c] * invstd_[c], exact = -scale * invstd_[c] * mean_dz_xhat;
    slope = static_cast<float>(exact);
    offset = static_cast<float>(-scale * mean_dz - low_[c] * exact);
  }

 private:
  std::vector<double> weight_, bias_;
  double eps_;
  Activation activation_;
  std::vector<double> invstd_, low_;
  std::vector<float> mean_, scale_, shift_;
};

// --- forward ---------------------------------------------------------------------------------------------------------

// The moments of every channel, into mean and m2, then `use`.
//
// The pivot of a channel is its first value. Because it is one of the n values, |pivot - mean| <= std sqrt(n), and the
// difference of the two float64 sums loses at most a relative n 2^-53 of the variance, whatever the data's offset.
template <class Each, class Use, class UseRows>
void moments_then(const Input& input, double* mean, double* m2, const Each& each, const Use& use,
                  const UseRows& use_rows) {
  const Walk& w = input.walk;
  const float* x = input.data();
  const Kernels& k = kernels();
  const double n = static_cast<double>(w.count());
  reduce_then(
      w,
      [&](int64_t c, int64_t begin, int64_t end, double* sums) {
        k.plane_moments(w, x, c, begin, end, x[c * w.inner], sums);
      },
      [&](int64_t begin, int64_t end, double* sums) { k.row_moments(w, x, begin, end, x, sums); },
      [&](int64_t c, double first, double second) {
        mean[c] = x[c * w.inner] + first / n;
        const double squares = second - first * (first / n);
        m2[c] = squares < 0 ? 0 : squares;  // NaN stays NaN
        each(c);
      },
      use, use_rows);
}

void zero(const Tensor& t) { std::fill_n(t.mutable_data_ptr<double>(), t.numel(), 0.0); }

std::tuple<Tensor, Tensor> batch_moments(const Tensor& x, int64_t channel_dim) {
  const Input input(x, channel_dim);
  Tensor mean = input.statistic(), m2 = input.statistic();
  if (x.numel() == 0) {
    zero(mean), zero(m2);
  } else {
    moments_then(
        input, mean.mutable_data_ptr<double>(), m2.mutable_data_ptr<double>(), [](int64_t) {}, no_use, no_use_rows);
  }
  return {mean, m2};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& residual, double eps, int64_t channel_dim,
                                           const OptionalString& activation) {
  const Input input(x, channel_dim);
  const Walk& w = input.walk;
  Normalization norm(w.channels, weight, bias, eps, activation);
  const OptionalTensor added = residual ? OptionalTensor(input.aligned(*residual, "residual")) : std::nullopt;
  Tensor y = fresh_like(input.tensor), mean = input.statistic(), m2 = input.statistic();
  if (x.numel() == 0) {
    zero(mean), zero(m2);
    return {y, mean, m2};
  }
  double *means = mean.mutable_data_ptr<double>(), *m2s = m2.mutable_data_ptr<double>();
  const Forward t{input.data(), added ? added->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>()};
  const Affine affine = norm.affine();
  const Kernels& k = kernels();
  moments_then(
      input, means, m2s, [&](int64_t c) { norm.set(c, means[c], m2s[c] / static_cast<double>(w.count())); },
      [&](int64_t c, int64_t begin, int64_t end) { k.plane_apply(w, t, affine, c, begin, end); },
      [&](int64_t begin, int64_t end) { k.row_apply(w, t, affine, begin, end); });
  return {y, mean, m2};
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                 const OptionalString& activation) {
  const Input input(x, channel_dim);
  const Walk& w = input.walk;
  Normalization norm(w.channels, weight, bias, eps, activation);
  norm.set_all(mean, var);
  const OptionalTensor added = residual ? OptionalTensor(input.aligned(*residual, "residual")) : std::nullopt;
  Tensor y = fresh_like(input.tensor);
  const Forward t{input.data(), added ? added->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>()};
  const Affine affine = norm.affine();
  const Kernels& k = kernels();
  for_each_part(
      w, [&](int64_t c, int64_t begin, int64_t end) { k.plane_apply(w, t, affine, c, begin, end); },
      [&](int64_t begin, int64_t end) { k.row_apply(w, t, affine, begin, end); });
  return y;
}

// --- backward --------------------------------------------------------------------------------------------------------

// What the three backward operations share: their tensors in one memory order, and the normalisation.
struct Gradient {
  Input input;
  Tensor dy;
  OptionalTensor residual;
  Normalization norm;
  Affine affine;
  Backward t;
  std::vector<float> slope, offset;

  Gradient(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual_, double eps, int64_t channel_dim,
           const OptionalString& activation)
      : input(x, channel_dim),
        dy(input.aligned(dy_, "dy")),
        residual(residual_ ? OptionalTensor(input.aligned(*residual_, "residual")) : std::nullopt),
        norm(input.walk.channels, weight, bias, eps, activation),
        affine(norm.affine()),
        t{dy.const_data_ptr<float>(), input.data(), residual ? residual->const_data_ptr<float>() : nullptr, nullptr,
          nullptr},
        slope(input.walk.channels),
        offset(input.walk.channels) {
    norm.set_all(mean, var);
  }

  // The outputs of the input's shape; dresidual is empty where it is not wanted.
  std::tuple<Tensor, Tensor> outputs() {
    Tensor dx = fresh_like(input.tensor);
    const bool wanted = residual && affine.activation != Activation::none;
    Tensor dresidual = wanted ? fresh_like(input.tensor) : torch::stable::new_empty(input.tensor, {0});
    t.dx = dx.mutable_data_ptr<float>();
    t.dresidual = wanted ? dresidual.mutable_data_ptr<float>() : nullptr;
    return {dx, dresidual};
  }

  void set_slope(int64_t c, double mean_dz, double mean_dz_xhat) {
    norm.slope(c, mean_dz, mean_dz_xhat, slope[c], offset[c]);
  }

  Slopes slopes() const { return {slope.data(), offset.data()}; }

  template <class Each, class Use, class UseRows>
  void sums_then(double* sum_dz, double* sum_dz_xhat, const Each& each, const Use& use, const UseRows& use_rows) {
    const Walk& w = input.walk;
    const Kernels& k = kernels();
    reduce_then(
        w,
        [&](int64_t c, int64_t begin, int64_t end, double* sums) { k.plane_sums(w, t, affine, c, begin, end, sums); },
        [&](int64_t begin, int64_t end, double* sums) { k.row_sums(w, t, affine, begin, end, sums); },
        [&](int64_t c, double first, double second) {
          sum_dz[c] = first;
          sum_dz_xhat[c] = norm.normalized_sum(c, first, second);
          each(c);
        },
        use, use_rows);
  }
};

std::tuple<Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, double eps, int64_t channel_dim,
                                         const OptionalString& activation) {
  Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation);
  Tensor sum_dz = g.input.statistic(), sum_dz_xhat = g.input.statistic();
  if (x.numel() == 0) {
    zero(sum_dz), zero(sum_dz_xhat);
  } else {
    g.sums_then(
        sum_dz.mutable_data_ptr<double>(), sum_dz_xhat.mutable_data_ptr<double>(), [](int64_t) {}, no_use, no_use_rows);
  }
  return {sum_dz, sum_dz_xhat};
}

std::tuple<Tensor, Tensor> backward_input(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& residual, double eps, int64_t channel_dim,
                                          const OptionalString& activation, const OptionalTensor& mean_dz,
                                          const OptionalTensor& mean_dz_xhat) {
  Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation);
  const Walk& w = g.input.walk;
  auto [dx, dresidual] = g.outputs();
  const auto first = read(mean_dz, w.channels, "mean_dz", 0), second = read(mean_dz_xhat, w.channels, "mean_dz_xhat", 0);
  for (int64_t c = 0; c < w.channels; ++c) g.set_slope(c, first[c], second[c]);
  const Slopes slopes = g.slopes();
  const Kernels& k = kernels();
  for_each_part(
      w, [&](int64_t c, int64_t begin, int64_t end) { k.plane_grad(w, g.t, g.affine, slopes, c, begin, end); },
      [&](int64_t begin, int64_t end) { k.row_grad(w, g.t, g.affine, slopes, begin, end); });
  return {dx, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                    const Tensor& var, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                                    double eps, int64_t channel_dim, const OptionalString& activation) {
  Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation);
  const Walk& w = g.input.walk;
  auto [dx, dresidual] = g.outputs();
  Tensor sum_dz = g.input.statistic(), sum_dz_xhat = g.input.statistic();
  if (x.numel() == 0) {
    zero(sum_dz), zero(sum_dz_xhat);
    return {dx, dresidual, sum_dz, sum_dz_xhat};
  }
  double *first = sum_dz.mutable_data_ptr<double>(), *second = sum_dz_xhat.mutable_data_ptr<double>();
  const double n = static_cast<double>(w.count());
  const Slopes slopes = g.slopes();
  const Kernels& k = kernels();
  g.sums_then(
      first, second, [&](int64_t c) { g.set_slope(c, first[c] / n, second[c] / n); },
      [&](int64_t c, int64_t begin, int64_t end) { k.plane_grad(w, g.t, g.affine, slopes, c, begin, end); },
      [&](int64_t begin, int64_t end) { k.row_grad(w, g.t, g.affine, slopes, begin, end); });
  return {dx, dresidual, sum_dz, sum_dz_xhat};
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("batch_moments", TORCH_BOX(&batchnorm::batch_moments));
  m.impl("normalize", TORCH_BOX(&batchnorm::normalize));
  m.impl("forward", TORCH_BOX(&batchnorm::forward));
  m.impl("backward_sums", TORCH_BOX(&batchnorm::backward_sums));
  m.impl("backward_input", TORCH_BOX(&batchnorm::backward_input));
  m.impl("backward", TORCH_BOX(&batchnorm::backward));
}
