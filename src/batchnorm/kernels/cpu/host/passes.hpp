// The passes over an input: what each does to a range of values, and with each channel's sums. A schedule runs them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "host/domains.hpp"
#include "host/levels.hpp"
#include "host/mask.hpp"
#include "host/normalization.hpp"
#include "host/output.hpp"
#include "host/schedule.hpp"
#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

void zero(const Tensor& t) { std::fill_n(t.mutable_data_ptr<double>(), t.numel(), 0.0); }

// --- forward ---------------------------------------------------------------------------------------------------------

// The moments of every channel, for a schedule's `reduce`: `add` for a range, `finish` for a channel.
//
// The pivot of a channel is the first value that counts. Because it is one of the n values, |pivot - mean| is at most
// std sqrt(n), and the difference of the two float64 sums loses at most a relative n 2^-53 of the variance, whatever
// the data's offset.
//
// Without a mask the loops add up half precision in float32 for a few steps. There the pivot has to be near the mean: it
// is the mean of a few values, and where that turns out to be far away, the sums are taken once more about the mean.
class MomentsPass {
 public:
  MomentsPass(const Input& input, const Domains& domains, int64_t channel_dim, int64_t repeat,
              const OptionalTensor& mask)
      : mask_(input, channel_dim, mask),
        counts_(mask_.counts(domains)),
        count(count_tensor(counts_, !domains)),
        mean(allocate_table(domains, input.extents.channels)),
        m2(allocate_table(domains, input.extents.channels)),
        narrow_(input.tensor.element_size() < 4 && !mask),
        channels_(input.extents.channels),
        width_(channels_ * repeat),
        data_(input.data()),
        kernels_(kernels(input.dtype)),
        pivots_(width_ * domains.number),
        means_(mean.mutable_data_ptr<double>()),
        m2s_(m2.mutable_data_ptr<double>()) {
    if (input.extents.size() == 0) {
      zero(mean), zero(m2);
      return;
    }
    for (int64_t d = 0; d < domains.number; ++d) {
      double* row = pivots_.data() + d * width_;
      if (counts_[d].sum > 0 || !domains) input.values_at(counts_[d].first, row);
      if (narrow_) average(input, domains, d, row);
      for (int64_t i = channels_; i < width_; ++i) row[i] = row[i - channels_];
    }
  }

  void add(const Extents& e, int64_t begin, int64_t end, Sums sums) const {
    kernels_.moments(e, data_, mask_.view(), pivots_.data(), begin, end, sums);
  }

  // Whether the sums have to be taken again, about another pivot.
  bool finish(int64_t c, double first, double second) {
    const int64_t domain = domain_of(c);
    const double n = counts_[domain].sum;
    if (n == 0) {
      means_[c] = m2s_[c] = 0;
      return false;
    }
    double* row = pivots_.data() + domain * width_;
    const int64_t channel = c - domain * channels_;
    means_[c] = row[channel] + first / n;
    const double squares = second - first * (first / n);
    m2s_[c] = squares < 0 ? 0 : squares;  // NaN stays NaN
    const bool far = first * (first / n) > kNear * kNear * m2s_[c];
    const double pivot = static_cast<float>(means_[c]);
    if (!narrow_ || !far || pivot == row[channel]) return false;
    for (int64_t i = channel; i < width_; i += channels_) row[i] = pivot;
    return true;
  }

  double mean_of(int64_t c) const { return means_[c]; }
  double variance_of(int64_t c) const {
    const double n = counts_[domain_of(c)].sum;
    return n == 0 ? 0 : m2s_[c] / n;
  }

 private:
  static constexpr double kNear = 1.5;  // standard deviations: the sum of squares is then at most 3.25 times the least
  static constexpr int64_t kFew = 8;    // their mean is further away in one channel of 40,000

  int64_t domain_of(int64_t c) const { return counts_.size() == 1 ? 0 : c / channels_; }

  // A domain's pivots from several places, where these values are finite.
  void average(const Input& input, const Domains& domains, int64_t domain, double* pivots) {
    const int64_t sample = domains ? input.extents.count() / domains.samples() : 0;  // positions
    const std::vector<int64_t> samples = domains.samples_of(domain);
    const int64_t positions = domains ? sample * static_cast<int64_t>(samples.size()) : input.extents.count();
    if (positions < 8 * kFew) return;
    std::vector<double> sums(channels_), values(channels_);
    for (int64_t i = 0; i < kFew; ++i) {
      const int64_t at = positions / kFew * i;
      input.values_at(domains ? samples[at / sample] * sample + at % sample : at, values.data());
      for (int64_t c = 0; c < channels_; ++c) sums[c] += values[c];
    }
    for (int64_t c = 0; c < channels_; ++c)
      if (std::isfinite(sums[c])) pivots[c] = static_cast<float>(sums[c] / kFew);
  }

  MaskInput mask_;
  std::vector<Count> counts_;  // of each domain

 public:
  Tensor count, mean, m2;

 private:
  bool narrow_;
  int64_t channels_, width_;
  const void* data_;
  const Kernels& kernels_;
  std::vector<double> pivots_;
  double *means_, *m2s_;
};

// y = activation(z + residual), for ranges.
class ApplyPass {
 public:
  ApplyPass(const Input& input, const Normalization& norm, const OptionalTensor& residual, Output output)
      : residual_(input.aligned(residual, "residual")),
        output_(std::move(output)),
        tensors_{input.data(), residual_ ? residual_->const_data_ptr() : nullptr, output_.tensor.mutable_data_ptr(),
                 output_.stream},
        affine_(norm.affine()),
        kernels_(kernels(input.dtype)) {}

  void operator()(const Extents& e, int64_t begin, int64_t end) const {
    kernels_.apply(e, tensors_, affine_, begin, end);
  }

  const Tensor& y() const { return output_.tensor; }
  bool in_order() const { return output_.in_order; }

 private:
  OptionalTensor residual_;
  Output output_;
  Forward tensors_;
  Affine affine_;
  const Kernels& kernels_;
};

// --- backward --------------------------------------------------------------------------------------------------------

// What the three backward operations share: their tensors in one memory order, and the normalization.
struct BackwardInputs {
  Input input;
  Domains domains;
  Schedule schedule;
  Tensor dy;
  OptionalTensor residual;
  Normalization norm;
  Affine affine;
  Coefficient slope, offset;
  MaskInput mask;

  // The domains are as many as the mean has rows.
  BackwardInputs(const Tensor& dy_, const Tensor& x, const Tensor& mean, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual_, double eps, int64_t channel_dim,
                 int activation, const OptionalTensor& mask_, const OptionalTensor& domain)
      : input(x, channel_dim, Order::outputs),
        domains(input, channel_dim, domain, mean.dim() == 2 ? mean.size(0) : 1),
        schedule(domains.in(input), input.tensor.element_size(), domains.number),
        dy(input.aligned(dy_, "dy")),
        residual(input.aligned(residual_, "residual")),
        norm(input, domains, schedule.repeat(), weight, bias, eps, activation),
        affine(norm.affine()),
        slope(input, domains, schedule.repeat()),
        offset(input, domains, schedule.repeat()),
        mask(input, channel_dim, mask_) {}

  BackwardInputs(const BackwardInputs&) = delete;  // its parts refer to each other

  // How many entries the tables have.
  int64_t entries() const { return domains.number * input.extents.channels; }

  Backward tensors() const {
    return {dy.const_data_ptr(), input.data(), residual ? residual->const_data_ptr() : nullptr,
            nullptr,             nullptr,      false,
            mask.view()};
  }

  void set_grad(int64_t c, double mean_dz, double mean_dz_xhat) {
    norm.set_grad(c, mean_dz, mean_dz_xhat, slope, offset);
  }
};

// sum dz and sum dz x_hat of every channel, for a schedule's `reduce`: `add` for a range, `finish` for a channel.
class SumsPass {
 public:
  explicit SumsPass(const BackwardInputs& b)
      : tensors_(b.tensors()),
        norm_(b.norm),
        affine_(b.affine),
        kernels_(kernels(b.input.dtype)),
        domains_(b.domains),
        channels_(b.input.extents.channels),
        sums_(b.entries()),
        products_(b.entries()) {}

  void add(const Extents& e, int64_t begin, int64_t end, Sums s) const {
    kernels_.sums(e, tensors_, affine_, begin, end, s);
  }

  bool finish(int64_t c, double first, double second) {
    sums_[c] = first;
    products_[c] = norm_.normalized_sum(c, first, second);
    return false;
  }

  double sum_of(int64_t c) const { return sums_[c]; }
  double product_of(int64_t c) const { return products_[c]; }

  // In float64, or in the dtype of what they are the gradients of.
  Tensor sum_dz(const OptionalTensor& like = std::nullopt) const { return gradient(sums_, like); }
  Tensor sum_dz_xhat(const OptionalTensor& like = std::nullopt) const { return gradient(products_, like); }

 private:
  Tensor gradient(const std::vector<double>& sums, const OptionalTensor& like) const {
    return gradient_of(sums, domains_, channels_, like);
  }

  Backward tensors_;
  const Normalization& norm_;
  Affine affine_;
  const Kernels& kernels_;
  const Domains& domains_;
  int64_t channels_;
  std::vector<double> sums_, products_;
};

// dx and dresidual, for ranges; dresidual is empty where there is no residual or no activation.
class GradPass {
 public:
  // `constants`: the statistics do not depend on x.
  explicit GradPass(const BackwardInputs& b, bool constants = false)
      : dx_(Output::like(b.input)),
        tensors_(b.tensors()),
        affine_(b.affine),
        coefficients_{b.slope.view(), b.offset.view(), constants},
        kernels_(kernels(b.input.dtype)) {
    const bool wanted = b.residual && b.affine.activation != 0;
    if (wanted) dresidual_ = Output::like(b.input);
    tensors_.dx = dx_.tensor.mutable_data_ptr();
    tensors_.dresidual = wanted ? dresidual_->tensor.mutable_data_ptr() : nullptr;
    tensors_.stream = dx_.stream && (!wanted || dresidual_->stream);
  }

  void operator()(const Extents& e, int64_t begin, int64_t end) const {
    kernels_.grad(e, tensors_, affine_, coefficients_, begin, end);
  }

  const Tensor& dx() const { return dx_.tensor; }
  Tensor dresidual() const { return dresidual_ ? dresidual_->tensor : allocate_vector(0, dtype_code(dx_.tensor)); }
  bool in_order() const { return dx_.in_order; }

 private:
  Output dx_;
  std::optional<Output> dresidual_;
  Backward tensors_;
  Affine affine_;
  GradCoefficients coefficients_;
  const Kernels& kernels_;
};

}  // namespace
}  // namespace batchnorm
