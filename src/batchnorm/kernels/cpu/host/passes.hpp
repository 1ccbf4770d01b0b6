// The passes over an input: what each does to a range of values, and with each channel's sums. A schedule runs them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

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
  MomentsPass(const Input& input, int64_t channel_dim, int64_t repeat, const OptionalTensor& mask)
      : mask_(input, channel_dim, mask),
        total_(mask_.count()),
        count(total_.tensor()),
        mean(input.statistic()),
        m2(input.statistic()),
        narrow_(input.tensor.element_size() < 4 && !mask),
        channels_(input.extents.channels),
        data_(input.data()),
        n_(total_.sum),
        kernels_(kernels(input.dtype)),
        pivots_(input.extents.channels * repeat),
        means_(mean.mutable_data_ptr<double>()),
        m2s_(m2.mutable_data_ptr<double>()) {
    if (input.extents.size() == 0) {
      zero(mean), zero(m2);
      return;
    }
    input.values_at(total_.first, pivots_.data());
    if (narrow_) average(input);
    for (size_t i = channels_; i < pivots_.size(); ++i) pivots_[i] = pivots_[i - channels_];
  }

  void add(const Extents& e, int64_t begin, int64_t end, Sums sums) const {
    kernels_.moments(e, data_, mask_.view(), pivots_.data(), begin, end, sums);
  }

  // Whether the sums have to be taken again, about another pivot.
  bool finish(int64_t c, double first, double second) {
    if (n_ == 0) {
      means_[c] = m2s_[c] = 0;
      return false;
    }
    means_[c] = pivots_[c] + first / n_;
    const double squares = second - first * (first / n_);
    m2s_[c] = squares < 0 ? 0 : squares;  // NaN stays NaN
    const bool far = first * (first / n_) > kNear * kNear * m2s_[c];
    const double pivot = static_cast<float>(means_[c]);
    if (!narrow_ || !far || pivot == pivots_[c]) return false;
    for (size_t i = c; i < pivots_.size(); i += channels_) pivots_[i] = pivot;
    return true;
  }

  double mean_of(int64_t c) const { return means_[c]; }
  double variance_of(int64_t c) const { return n_ == 0 ? 0 : m2s_[c] / n_; }

 private:
  static constexpr double kNear = 1.5;  // standard deviations: the sum of squares is then at most 3.25 times the least
  static constexpr int64_t kFew = 8;    // their mean is further away in one channel of 40,000

  // Pivots from several places, where these values are finite.
  void average(const Input& input) {
    const int64_t positions = input.extents.count();
    if (positions < 8 * kFew) return;
    std::vector<double> sums(channels_), values(channels_);
    for (int64_t i = 0; i < kFew; ++i) {
      input.values_at(positions / kFew * i, values.data());
      for (int64_t c = 0; c < channels_; ++c) sums[c] += values[c];
    }
    for (int64_t c = 0; c < channels_; ++c)
      if (std::isfinite(sums[c])) pivots_[c] = static_cast<float>(sums[c] / kFew);
  }

  MaskInput mask_;
  Count total_;

 public:
  Tensor count, mean, m2;

 private:
  bool narrow_;
  int64_t channels_;
  const void* data_;
  double n_;
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
  Schedule schedule;
  Tensor dy;
  OptionalTensor residual;
  Normalization norm;
  Affine affine;
  Coefficient slope, offset;
  MaskInput mask;

  // The variance is m2 / count; with a count of 1, m2 is the variance itself.
  BackwardInputs(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& m2, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual_, double eps, int64_t channel_dim,
                 int activation, const OptionalTensor& mask_, double count = 1)
      : input(x, channel_dim, Order::outputs),
        schedule(input.extents, input.tensor.element_size()),
        dy(input.aligned(dy_, "dy")),
        residual(input.aligned(residual_, "residual")),
        norm(input, schedule.repeat(), weight, bias, eps, activation),
        affine(norm.affine()),
        slope(input, schedule.repeat()),
        offset(input, schedule.repeat()),
        mask(input, channel_dim, mask_) {
    norm.set_all(mean, m2, count);
  }

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
        sums_(b.input.extents.channels),
        products_(b.input.extents.channels) {}

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
  Tensor sum_dz(const OptionalTensor& like = std::nullopt) const { return vector_of(sums_, like); }
  Tensor sum_dz_xhat(const OptionalTensor& like = std::nullopt) const { return vector_of(products_, like); }

 private:
  Backward tensors_;
  const Normalization& norm_;
  Affine affine_;
  const Kernels& kernels_;
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
