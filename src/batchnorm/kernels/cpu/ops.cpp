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

void zero(const Tensor& t) { std::fill_n(t.mutable_data_ptr<double>(), t.numel(), 0.0); }

// --- forward ---------------------------------------------------------------------------------------------------------

// The moments of every channel, to be taken by a schedule's `reduce`: `add` for a range, `finish` for a channel.
//
// The pivot of a channel is its first value. Because it is one of the n values, |pivot - mean| <= std sqrt(n), and the
// difference of the two float64 sums loses at most a relative n 2^-53 of the variance, whatever the data's offset.
class MomentsOf {
 public:
  explicit MomentsOf(const Input& input, int64_t repeat)
      : mean(input.statistic()),
        m2(input.statistic()),
        data_(input.data()),
        n_(static_cast<double>(input.walk.count())),
        kernels_(kernels(input.dtype)),
        pivots_(input.walk.channels * repeat),
        means_(mean.mutable_data_ptr<double>()),
        m2s_(m2.mutable_data_ptr<double>()) {
    if (input.walk.size() == 0) {
      zero(mean), zero(m2);
      return;
    }
    input.pivots(pivots_.data());
    for (size_t i = input.walk.channels; i < pivots_.size(); ++i) pivots_[i] = pivots_[i - input.walk.channels];
  }

  void add(const Walk& w, int64_t begin, int64_t end, Sums sums) const {
    kernels_.moments(w, data_, pivots_.data(), begin, end, sums);
  }

  void finish(int64_t c, double first, double second) const {
    means_[c] = pivots_[c] + first / n_;
    const double squares = second - first * (first / n_);
    m2s_[c] = squares < 0 ? 0 : squares;  // NaN stays NaN
  }

  Tensor count() const {
    Tensor t = allocate(0, nullptr, nullptr, aoti_torch_dtype_int64());
    *t.mutable_data_ptr<int64_t>() = static_cast<int64_t>(n_);
    return t;
  }

  double mean_of(int64_t c) const { return means_[c]; }
  double variance_of(int64_t c) const { return m2s_[c] / n_; }

  Tensor mean, m2;

 private:
  const void* data_;
  double n_;
  const Kernels& kernels_;
  std::vector<double> pivots_;
  double *means_, *m2s_;
};

std::tuple<Tensor, Tensor, Tensor> batch_moments(const Tensor& x, int64_t channel_dim) {
  const Input input(x, channel_dim);
  const Schedule schedule(input.walk, input.tensor.element_size());
  const MomentsOf moments(input, schedule.repeat());
  schedule.reduce([&](const Walk& w, int64_t begin, int64_t end, Sums s) { moments.add(w, begin, end, s); },
                  [&](int64_t c, double first, double second) { moments.finish(c, first, second); });
  return {moments.count(), moments.mean, moments.m2};
}

// What y is made of, for ranges.
class Applied {
 public:
  Applied(const Input& input, const Normalization& norm, const OptionalTensor& residual, Output output)
      : residual_(input.aligned(residual, "residual")),
        output_(std::move(output)),
        tensors_{input.data(), residual_ ? residual_->const_data_ptr() : nullptr, output_.tensor.mutable_data_ptr(),
                 output_.stream},
        affine_(norm.affine()),
        kernels_(kernels(input.dtype)) {}

  void operator()(const Walk& w, int64_t begin, int64_t end) const { kernels_.apply(w, tensors_, affine_, begin, end); }

  const Tensor& y() const { return output_.tensor; }
  bool fresh() const { return output_.fresh; }

 private:
  OptionalTensor residual_;
  Output output_;
  Forward tensors_;
  Affine affine_;
  const Kernels& kernels_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                                   double eps, int64_t channel_dim, const OptionalString& activation) {
  const Input input(x, channel_dim);
  const Schedule schedule(input.walk, input.tensor.element_size());
  const MomentsOf moments(input, schedule.repeat());
  Normalization norm(input, schedule.repeat(), weight, bias, eps, activation);
  const Applied apply(input, norm, residual, Output::like(input.tensor, input.walk));
  schedule.reduce_then(
      schedule.blocks() && !apply.fresh(),
      [&](const Walk& w, int64_t begin, int64_t end, Sums s) { moments.add(w, begin, end, s); },
      [&](int64_t c, double first, double second) {
        moments.finish(c, first, second);
        norm.set(c, moments.mean_of(c), moments.variance_of(c));
      },
      apply);
  return {apply.y(), moments.count(), moments.mean, moments.m2};
}

Tensor normalize_into(const Input& input, Output output, const Tensor& mean, const Tensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      double eps, const OptionalString& activation) {
  const Schedule schedule(input.walk, input.tensor.element_size());
  Normalization norm(input, schedule.repeat(), weight, bias, eps, activation);
  norm.set_all(mean, var);
  const Applied apply(input, norm, residual, std::move(output));
  schedule.each(apply);
  return apply.y();
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                 const OptionalString& activation) {
  const Input input(x, channel_dim);
  return normalize_into(input, Output::like(input.tensor, input.walk), mean, var, weight, bias, residual, eps, activation);
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                const OptionalString& activation) {
  const Input input(x, channel_dim);
  const bool copied = input.tensor.data_ptr() != x.data_ptr();
  const Tensor y = normalize_into(input, Output{input.tensor}, mean, var, weight, bias, residual, eps, activation);
  if (copied) {
    Tensor target = x;
    torch::stable::copy_(target, y);
  }
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

  // The variance is spread / divisor.
  Gradient(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& spread, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual_, double eps, int64_t channel_dim,
           const OptionalString& activation, double divisor = 1)
      : input(x, channel_dim),
        schedule(input.walk, input.tensor.element_size()),
        dy(input.aligned(dy_, "dy")),
        residual(input.aligned(residual_, "residual")),
        norm(input, schedule.repeat(), weight, bias, eps, activation),
        affine(norm.affine()),
        slope(input, schedule.repeat()),
        offset(input, schedule.repeat()) {
    norm.set_all(mean, spread, divisor);
  }

  Backward tensors() const {
    return {dy.const_data_ptr(), input.data(), residual ? residual->const_data_ptr() : nullptr, nullptr, nullptr, false};
  }

  void set_slope(int64_t c, double mean_dz, double mean_dz_xhat) {
    norm.set_slope(c, mean_dz, mean_dz_xhat, slope, offset);
  }
};

// sum dz and sum dz x_hat of every channel, to be taken by a schedule's `reduce`: `add` for a range, `finish` for a
// channel.
class GradientSums {
 public:
  explicit GradientSums(const Gradient& g)
      : tensors_(g.tensors()),
        norm_(g.norm),
        affine_(g.affine),
        kernels_(kernels(g.input.dtype)),
        sums_(g.input.walk.channels),
        products_(g.input.walk.channels) {}

  void add(const Walk& w, int64_t begin, int64_t end, Sums s) const { kernels_.sums(w, tensors_, affine_, begin, end, s); }

  void finish(int64_t c, double first, double second) {
    sums_[c] = first;
    products_[c] = norm_.normalized_sum(c, first, second);
  }

  double sum_of(int64_t c) const { return sums_[c]; }
  double product_of(int64_t c) const { return products_[c]; }

  // In float64, or in the dtype of what they are the gradients of.
  Tensor sum_dz(const OptionalTensor& like = std::nullopt) const { return vector_of(sums_, like); }
  Tensor sum_dz_xhat(const OptionalTensor& like = std::nullopt) const { return vector_of(products_, like); }

 private:
  Backward tensors_;
  const Normalization& norm_;
  Affine affine_;
  const Kernels& kernels_;
  std::vector<double> sums_, products_;
};

// What dx and dresidual are made of, for ranges; dresidual is empty where it is not wanted.
class Differentiated {
 public:
  explicit Differentiated(const Gradient& g)
      : dx_(Output::like(g.input.tensor, g.input.walk)), tensors_(g.tensors()), affine_(g.affine), slopes_{g.slope.view(), g.offset.view()},
        kernels_(kernels(g.input.dtype)) {
    const bool wanted = g.residual && g.affine.activation != Activation::none;
    if (wanted) dresidual_ = Output::like(g.input.tensor, g.input.walk);
    tensors_.dx = dx_.tensor.mutable_data_ptr();
    tensors_.dresidual = wanted ? dresidual_->tensor.mutable_data_ptr() : nullptr;
    tensors_.stream = dx_.stream && (!wanted || dresidual_->stream);
  }

  void operator()(const Walk& w, int64_t begin, int64_t end) const {
    kernels_.grad(w, tensors_, affine_, slopes_, begin, end);
  }

  const Tensor& dx() const { return dx_.tensor; }
  Tensor dresidual() const { return dresidual_ ? dresidual_->tensor : allocate_vector(0, dtype_code(dx_.tensor)); }
  bool fresh() const { return dx_.fresh; }

 private:
  Output dx_;
  std::optional<Output> dresidual_;
  Backward tensors_;
  Affine affine_;
  Slopes slopes_;
  const Kernels& kernels_;
};

std::tuple<Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, double eps, int64_t channel_dim,
                                         const OptionalString& activation) {
  const Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation);
  GradientSums sums(g);
  g.schedule.reduce([&](const Walk& w, int64_t begin, int64_t end, Sums s) { sums.add(w, begin, end, s); },
                    [&](int64_t c, double first, double second) { sums.finish(c, first, second); });
  return {sums.sum_dz(), sums.sum_dz_xhat()};
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
  const Differentiated apply(g);
  g.schedule.each(apply);
  return {apply.dx(), apply.dresidual()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& count,
                                                    const Tensor& mean, const Tensor& m2, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                                    double eps, int64_t channel_dim, const OptionalString& activation) {
  const double n = std::max(1.0, read_count(count));
  Gradient g(dy, x, mean, m2, weight, bias, residual, eps, channel_dim, activation, n);
  GradientSums sums(g);
  const Differentiated apply(g);
  g.schedule.reduce_then(
      g.schedule.blocks() && !apply.fresh(),
      [&](const Walk& w, int64_t begin, int64_t end, Sums s) { sums.add(w, begin, end, s); },
      [&](int64_t c, double first, double second) {
        sums.finish(c, first, second);
        g.set_slope(c, sums.sum_of(c) / n, sums.product_of(c) / n);
      },
      apply);
  return {apply.dx(), sums.sum_dz_xhat(weight), sums.sum_dz(bias), apply.dresidual()};
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
            const Tensor& count, const Tensor& mean, const Tensor& m2, std::optional<double> momentum) {
  const int64_t channels = mean.numel();
  const auto means = read(mean, channels, "mean");
  auto variances = read(m2, channels, "m2");
  const double n = read_count(count);
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
  m.impl("normalize_", TORCH_BOX(&batchnorm::normalize_));
  m.impl("forward", TORCH_BOX(&batchnorm::forward));
  m.impl("backward_sums", TORCH_BOX(&batchnorm::backward_sums));
  m.impl("backward_input", TORCH_BOX(&batchnorm::backward_input));
  m.impl("backward", TORCH_BOX(&batchnorm::backward));
  m.impl("commit", TORCH_BOX(&batchnorm::commit));
}
