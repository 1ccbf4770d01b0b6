// The passes over an input: what each does to a range of values, and with each channel's sums. A schedule runs them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "host/domains.hpp"
#include "host/gathering.hpp"
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

// How many bytes belong to a sample.
struct SampleSize {
  int64_t values = 0, positions = 0;

  SampleSize(const Input& input, const Domains& domains) {
    if (domains.samples() == 0) return;
    positions = input.extents.count() / domains.samples();
    values = positions * input.extents.channels * input.tensor.element_size();
  }

  SampleArray read(const void* data, SampleBuffer buffer, Use use = Use::read) const {
    return {data, values, buffer, use};
  }
  SampleArray read(const Mask& mask, Use use = Use::read) const {
    return {mask.values, positions * size_of(mask.type), kMask, use};
  }
  SampleArray written(void* data, SampleBuffer buffer) const { return {data, values, buffer, Use::written}; }
};

Mask replaced(Mask mask, const void* values) {
  mask.values = values;
  return mask;
}

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
  MomentsPass(const Input& input, const Domains& domains, int64_t channel_dim, const Schedule& schedule,
              const OptionalTensor& mask)
      : mask_(input, channel_dim, mask),
        counts_(mask_.counts(domains)),
        count(count_tensor(counts_, !domains)),
        mean(allocate_table(domains, input.extents.channels)),
        m2(allocate_table(domains, input.extents.channels)),
        narrow_(input.tensor.element_size() < 4 && !mask),
        channels_(input.extents.channels),
        width_(channels_ * schedule.repeat()),
        data_(input.data()),
        gathering_(schedule.gathering()),
        arrays_{SampleSize(input, domains).read(data_, kX), SampleSize(input, domains).read(mask_.view())},
        kernels_(kernels(input.dtype)),
        pivots_(width_ * domains.number),
        means_(mean.mutable_data_ptr<double>()),
        m2s_(m2.mutable_data_ptr<double>()) {
    if (input.extents.size() == 0) {
      zero(mean), zero(m2);
      return;
    }
    gathering_.reserve(arrays_);
    const auto some = narrow_ && domains ? domains.some(kFew) : std::vector<std::vector<int64_t>>(domains.number);
    for (int64_t d = 0; d < domains.number; ++d) {
      double* row = pivots_.data() + d * width_;
      if (counts_[d].sum > 0 || !domains) input.values_at(counts_[d].first, row);
      if (narrow_ && !(domains && some[d].empty())) average(input, domains, d, some[d], row);
      for (int64_t i = channels_; i < width_; ++i) row[i] = row[i - channels_];
    }
  }

  void add(const Extents& e, int64_t begin, int64_t end, Sums sums) const {
    if (!gathering_) return kernels_.moments(e, data_, mask_.view(), pivots_.data(), begin, end, sums);
    gathering_.each(begin, end, arrays_, [&](const Extents& of_domain, int64_t row, const auto& at) {
      kernels_.moments(of_domain, at[0].data, replaced(mask_.view(), at[1].data), pivots_.data() + row, 0,
                       of_domain.size(), from(sums, row));
    });
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

  // A domain's pivots from several places, where these values are finite. `samples`: some of that domain.
  void average(const Input& input, const Domains& domains, int64_t domain, const std::vector<int64_t>& samples,
               double* pivots) {
    const auto positions = domains ? static_cast<int64_t>(counts_[domain].sum) : input.extents.count();
    if (positions < 8 * kFew) return;
    const int64_t sample = domains ? input.extents.count() / domains.samples() : positions;
    std::vector<double> sums(channels_), values(channels_);
    for (int64_t i = 0; i < kFew; ++i) {
      const int64_t of = domains ? samples[i * static_cast<int64_t>(samples.size()) / kFew] : 0;
      input.values_at(of * sample + sample / kFew * i, values.data());
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
  const Gathering& gathering_;
  std::array<SampleArray, 2> arrays_;
  const Kernels& kernels_;
  std::vector<double> pivots_;
  double *means_, *m2s_;
};

// y = activation(z + residual), for ranges.
class ApplyPass {
 public:
  ApplyPass(const Input& input, const Domains& domains, const Schedule& schedule, const Normalization& norm,
            const OptionalTensor& residual, Output output, bool after_moments)
      : residual_(input.aligned(residual, "residual")),
        output_(std::move(output)),
        tensors_{input.data(), residual_ ? residual_->const_data_ptr() : nullptr, output_.tensor.mutable_data_ptr(),
                 output_.stream},
        affine_(norm.affine()),
        gathering_(schedule.gathering()),
        arrays_{SampleSize(input, domains).read(tensors_.x, kX, after_moments ? Use::kept : Use::read),
                SampleSize(input, domains).read(tensors_.residual, kResidual),
                SampleSize(input, domains).written(tensors_.y, kX)},
        kernels_(kernels(input.dtype)) {
    gathering_.reserve(arrays_);
  }

  void operator()(const Extents& e, int64_t begin, int64_t end) const {
    if (!gathering_.of_outputs()) return kernels_.apply(e, tensors_, affine_, begin, end);
    gathering_.each(begin, end, arrays_, [&](const Extents& of_domain, int64_t row, const auto& at) {
      const Forward t{at[0].data, at[1].data, at[2].target(), false};
      kernels_.apply(of_domain, t, from(affine_, row), 0, of_domain.size());
    });
  }

  const Tensor& y() const { return output_.tensor; }
  bool in_order() const { return output_.in_order; }

 private:
  OptionalTensor residual_;
  Output output_;
  Forward tensors_;
  Affine affine_;
  const Gathering& gathering_;
  std::array<SampleArray, 3> arrays_;
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
        schedule(input, domains),
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

  // What the passes read.
  std::array<SampleArray, 4> arrays(Use use) const {
    const Backward t = tensors();
    const SampleSize sample(input, domains);
    return {sample.read(t.dy, kDy, use), sample.read(t.x, kX, use), sample.read(t.residual, kResidual, use),
            sample.read(t.mask, use)};
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
        gathering_(b.schedule.gathering()),
        arrays_(b.arrays(Use::read)),
        channels_(b.input.extents.channels),
        sums_(b.entries()),
        products_(b.entries()) {
    gathering_.reserve(arrays_);
  }

  void add(const Extents& e, int64_t begin, int64_t end, Sums s) const {
    if (!gathering_) return kernels_.sums(e, tensors_, affine_, begin, end, s);
    gathering_.each(begin, end, arrays_, [&](const Extents& of_domain, int64_t row, const auto& at) {
      const Backward t{at[0].data, at[1].data, at[2].data, nullptr, nullptr, false,
                       replaced(tensors_.mask, at[3].data)};
      kernels_.sums(of_domain, t, from(affine_, row), 0, of_domain.size(), from(s, row));
    });
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
  const Gathering& gathering_;
  std::array<SampleArray, 4> arrays_;
  int64_t channels_;
  std::vector<double> sums_, products_;
};

// dx and dresidual, for ranges; dresidual is empty where there is no residual or no activation.
class GradPass {
 public:
  // `constants`: the statistics do not depend on x.
  GradPass(const BackwardInputs& b, bool after_sums, bool constants)
      : dx_(Output::like(b.input)),
        tensors_(b.tensors()),
        affine_(b.affine),
        coefficients_{b.slope.view(), b.offset.view(), constants},
        gathering_(b.schedule.gathering()),
        kernels_(kernels(b.input.dtype)) {
    const bool wanted = b.residual && b.affine.activation != 0;
    if (wanted) dresidual_ = Output::like(b.input);
    tensors_.dx = dx_.tensor.mutable_data_ptr();
    tensors_.dresidual = wanted ? dresidual_->tensor.mutable_data_ptr() : nullptr;
    tensors_.stream = dx_.stream && (!wanted || dresidual_->stream);
    const SampleSize sample(b.input, b.domains);
    const auto [dy, x, residual, mask] = b.arrays(after_sums ? Use::kept : Use::read);
    arrays_ = {dy, x, residual, mask, sample.written(tensors_.dx, kX), sample.written(tensors_.dresidual, kDresidual)};
    gathering_.reserve(arrays_);
  }

  void operator()(const Extents& e, int64_t begin, int64_t end) const {
    if (!gathering_.of_outputs()) return kernels_.grad(e, tensors_, affine_, coefficients_, begin, end);
    gathering_.each(begin, end, arrays_, [&](const Extents& of_domain, int64_t row, const auto& at) {
      const Backward t{at[0].data, at[1].data, at[2].data, at[4].target(), at[5].target(), false,
                       replaced(tensors_.mask, at[3].data)};
      kernels_.grad(of_domain, t, from(affine_, row), from(coefficients_, row), 0, of_domain.size());
    });
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
  const Gathering& gathering_;
  std::array<SampleArray, 6> arrays_;
  const Kernels& kernels_;
};

}  // namespace
}  // namespace batchnorm
