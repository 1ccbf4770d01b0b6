// The operations on torch's tensors. What each means is written in kernels/reference.py, the schemas are in ops.py,
// the loops in kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "schedule.hpp"
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

// One value for each channel, as the kernels read it: repeated for joined rows, exact and rounded.
class Coefficient {
 public:
  Coefficient(int64_t channels, int64_t repeat) : channels_(channels), exact_(channels * repeat), rounded_(exact_.size()) {}

  void set(int64_t c, double value) {
    for (size_t i = c; i < exact_.size(); i += channels_) exact_[i] = value, rounded_[i] = static_cast<float>(value);
  }

  PerChannel view() const { return {exact_.data(), rounded_.data()}; }

 private:
  int64_t channels_;
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
        mean_(input.walk.channels, repeat),
        scale_(input.walk.channels, repeat),
        shift_(input.walk.channels, repeat) {}

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

void zero(const Tensor& t) { std::fill_n(t.mutable_data_ptr<double>(), t.numel(), 0.0); }

// --- forward ---------------------------------------------------------------------------------------------------------

// The moments of every channel, into mean and m2; `each(channel)` follows.
//
// The pivot of a channel is its first value. Because it is one of the n values, |pivot - mean| <= std sqrt(n), and the
// difference of the two float64 sums loses at most a relative n 2^-53 of the variance, whatever the data's offset.
template <class Each>
void reduce_moments(const Input& input, const Schedule& schedule, double* mean, double* m2, const Each& each) {
  const int64_t channels = input.walk.channels;
  const double n = static_cast<double>(input.walk.count());
  const Kernels& k = kernels(input.dtype);
  std::vector<double> pivots(channels * schedule.repeat());
  input.pivots(pivots.data());
  for (size_t i = channels; i < pivots.size(); ++i) pivots[i] = pivots[i - channels];
  schedule.reduce(
      [&](const Walk& w, int64_t begin, int64_t end, Sums sums) {
        k.moments(w, input.data(), pivots.data(), begin, end, sums);
      },
      [&](int64_t c, double first, double second) {
        mean[c] = pivots[c] + first / n;
        const double squares = second - first * (first / n);
        m2[c] = squares < 0 ? 0 : squares;  // NaN stays NaN
        each(c);
      });
}

std::tuple<Tensor, Tensor> batch_moments(const Tensor& x, int64_t channel_dim) {
  const Input input(x, channel_dim);
  Tensor mean = input.statistic(), m2 = input.statistic();
  if (x.numel() == 0) {
    zero(mean), zero(m2);
  } else {
    reduce_moments(input, Schedule(input.walk), mean.mutable_data_ptr<double>(), m2.mutable_data_ptr<double>(),
                   [](int64_t) {});
  }
  return {mean, m2};
}

// y, once the normalisation is known.
Tensor apply(const Input& input, const Schedule& schedule, const Normalization& norm, const OptionalTensor& residual) {
  const OptionalTensor added = input.aligned(residual, "residual");
  Tensor y = fresh_like(input.tensor);
  const Forward t{input.data(), added ? added->const_data_ptr() : nullptr, y.mutable_data_ptr()};
  const Affine affine = norm.affine();
  const Kernels& k = kernels(input.dtype);
  schedule.each_part(
      true, [&](int64_t, const Walk& w, int64_t begin, int64_t end) { k.apply(w, t, affine, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& residual, double eps, int64_t channel_dim,
                                           const OptionalString& activation) {
  const Input input(x, channel_dim);
  const Schedule schedule(input.walk);
  Normalization norm(input, schedule.repeat(), weight, bias, eps, activation);
  Tensor mean = input.statistic(), m2 = input.statistic();
  if (x.numel() == 0) {
    zero(mean), zero(m2);
  } else {
    double *means = mean.mutable_data_ptr<double>(), *m2s = m2.mutable_data_ptr<double>();
    const double n = static_cast<double>(input.walk.count());
    reduce_moments(input, schedule, means, m2s, [&](int64_t c) { norm.set(c, means[c], m2s[c] / n); });
  }
  return {apply(input, schedule, norm, residual), mean, m2};
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                 const OptionalString& activation) {
  const Input input(x, channel_dim);
  const Schedule schedule(input.walk);
  Normalization norm(input, schedule.repeat(), weight, bias, eps, activation);
  norm.set_all(mean, var);
  return apply(input, schedule, norm, residual);
}

// --- backward --------------------------------------------------------------------------------------------------------

// What the three backward operations share: their tensors in one memory order, and the normalisation.
struct Gradient {
  Input input;
  Schedule schedule;
  Tensor dy;
  OptionalTensor residual;
  Normalization norm;
  Affine affine;
  Coefficient slope, offset;

  // `spread` is the variance, or the sum of squared deviations, which is the variance times the count.
  Gradient(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& spread, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual_, double eps, int64_t channel_dim,
           const OptionalString& activation, bool squares = false)
      : input(x, channel_dim),
        schedule(input.walk),
        dy(input.aligned(dy_, "dy")),
        residual(input.aligned(residual_, "residual")),
        norm(input, schedule.repeat(), weight, bias, eps, activation),
        affine(norm.affine()),
        slope(input.walk.channels, schedule.repeat()),
        offset(input.walk.channels, schedule.repeat()) {
    norm.set_all(mean, spread, squares ? static_cast<double>(std::max<int64_t>(1, input.walk.count())) : 1);
  }

  Backward tensors() const {
    return {dy.const_data_ptr(), input.data(), residual ? residual->const_data_ptr() : nullptr, nullptr, nullptr};
  }

  // sum dz and sum dz x_hat; `each(channel)` follows.
  template <class Each>
  void reduce(const Tensor& sum_dz, const Tensor& sum_dz_xhat, const Each& each) {
    if (input.tensor.numel() == 0) {
      zero(sum_dz), zero(sum_dz_xhat);
      return;
    }
    double *sums = sum_dz.mutable_data_ptr<double>(), *products = sum_dz_xhat.mutable_data_ptr<double>();
    const Kernels& k = kernels(input.dtype);
    const Backward t = tensors();
    schedule.reduce(
        [&](const Walk& w, int64_t begin, int64_t end, Sums s) { k.sums(w, t, affine, begin, end, s); },
        [&](int64_t c, double first, double second) {
          sums[c] = first;
          products[c] = norm.normalized_sum(c, first, second);
          each(c, first, products[c]);
        });
  }

  void set_slope(int64_t c, double mean_dz, double mean_dz_xhat) {
    norm.set_slope(c, mean_dz, mean_dz_xhat, slope, offset);
  }

  // dx and dresidual, which is empty where it is not wanted.
  std::tuple<Tensor, Tensor> apply() const {
    const bool wanted = residual && affine.activation != Activation::none;
    Tensor dx = fresh_like(input.tensor);
    Tensor dresidual = wanted ? fresh_like(input.tensor) : allocate_vector(0, dtype_code(input.tensor));
    Backward t = tensors();
    t.dx = dx.mutable_data_ptr();
    t.dresidual = wanted ? dresidual.mutable_data_ptr() : nullptr;
    const Slopes slopes{slope.view(), offset.view()};
    const Kernels& k = kernels(input.dtype);
    schedule.each_part(
        true, [&](int64_t, const Walk& w, int64_t begin, int64_t end) { k.grad(w, t, affine, slopes, begin, end); });
    return {dx, dresidual};
  }
};

std::tuple<Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, double eps, int64_t channel_dim,
                                         const OptionalString& activation) {
  Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation);
  Tensor sum_dz = g.input.statistic(), sum_dz_xhat = g.input.statistic();
  g.reduce(sum_dz, sum_dz_xhat, [](int64_t, double, double) {});
  return {sum_dz, sum_dz_xhat};
}

std::tuple<Tensor, Tensor> backward_input(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& residual, double eps, int64_t channel_dim,
                                          const OptionalString& activation, const OptionalTensor& mean_dz,
                                          const OptionalTensor& mean_dz_xhat) {
  Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation);
  const int64_t channels = g.input.walk.channels;
  const auto first = read(mean_dz, channels, "mean_dz", 0), second = read(mean_dz_xhat, channels, "mean_dz_xhat", 0);
  for (int64_t c = 0; c < channels; ++c) g.set_slope(c, first[c], second[c]);
  return g.apply();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                    const Tensor& m2, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                                    double eps, int64_t channel_dim, const OptionalString& activation) {
  Gradient g(dy, x, mean, m2, weight, bias, residual, eps, channel_dim, activation, true);
  Tensor sum_dz = g.input.statistic(), sum_dz_xhat = g.input.statistic();
  const double n = static_cast<double>(g.input.walk.count());
  g.reduce(sum_dz, sum_dz_xhat,
           [&](int64_t c, double first, double second) { g.set_slope(c, first / n, second / n); });
  auto [dx, dresidual] = g.apply();
  return {dx, weight ? rounded(sum_dz_xhat, *weight) : sum_dz_xhat, bias ? rounded(sum_dz, *bias) : sum_dz, dresidual};
}

// --- running statistics ----------------------------------------------------------------------------------------------

void blend(const Tensor& running, const std::vector<double>& added, double factor, const char* name) {
  STD_TORCH_CHECK(running.dim() == 1 && running.size(0) == static_cast<int64_t>(added.size()) && running.is_cpu(),
                  "batchnorm: ", name, " must have one value for each channel, on the CPU");
  with_element(running, name, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* p = static_cast<T*>(running.mutable_data_ptr());
    const int64_t stride = running.stride(0);
    for (size_t c = 0; c < added.size(); ++c) {
      const double old = static_cast<double>(p[c * stride]);
      p[c * stride] = static_cast<T>(old + (added[c] - old) * factor);
    }
  });
}

void commit(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& num_batches_tracked,
            const Tensor& mean, const Tensor& m2, const Tensor& count, std::optional<double> momentum) {
  const int64_t channels = mean.numel();
  const auto means = read(mean, channels, "mean");
  auto variances = read(m2, channels, "m2");
  STD_TORCH_CHECK(count.numel() == 1 && count.is_cpu(), "batchnorm: count must be one number on the CPU");
  const double n = count.scalar_type() == ScalarType::Long ? static_cast<double>(*count.const_data_ptr<int64_t>())
                                                           : *count.const_data_ptr<double>();
  for (double& v : variances) v /= n - 1;
  double factor = momentum.value_or(0);
  int64_t* batches = num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  if (!momentum) {
    if (!batches) return;
    factor = 1 / static_cast<double>(*batches + 1);
  }
  blend(running_mean, means, factor, "running_mean");
  blend(running_var, variances, factor, "running_var");
  if (batches) *batches += 1;  // last: a refused update is not counted
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
  m.impl("commit", TORCH_BOX(&batchnorm::commit));
}
