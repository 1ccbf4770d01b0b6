// What the operations do to a range of values, and what becomes of each channel's sums: the parts that a schedule plays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.hpp"
#include "normalization.hpp"
#include "output.hpp"
#include "schedule.hpp"
#include "tensors.hpp"
#include "weights.hpp"

namespace batchnorm {
namespace {

void zero(const Tensor& t) { std::fill_n(t.mutable_data_ptr<double>(), t.numel(), 0.0); }

// --- forward ---------------------------------------------------------------------------------------------------------

// The moments of every channel, to be taken by a schedule's `reduce`: `add` for a range, `finish` for a channel.
//
// The pivot of a channel is the first value that counts. Because it is one of the n values, |pivot - mean| <= std sqrt(n), and the
// difference of the two float64 sums loses at most a relative n 2^-53 of the variance, whatever the data's offset.
class MomentsOf {
 public:
  MomentsOf(const Input& input, int64_t channel_dim, int64_t repeat, const OptionalTensor& mask)
      : weights_(input, channel_dim, mask),
        counted_(weights_.counted()),
        count(counted_.tensor()),
        mean(input.statistic()),
        m2(input.statistic()),
        data_(input.data()),
        n_(counted_.sum),
        kernels_(kernels(input.dtype)),
        pivots_(input.walk.channels * repeat),
        means_(mean.mutable_data_ptr<double>()),
        m2s_(m2.mutable_data_ptr<double>()) {
    if (input.walk.size() == 0) {
      zero(mean), zero(m2);
      return;
    }
    input.values_at(counted_.first, pivots_.data());
    for (size_t i = input.walk.channels; i < pivots_.size(); ++i) pivots_[i] = pivots_[i - input.walk.channels];
  }

  void add(const Walk& w, int64_t begin, int64_t end, Sums sums) const {
    kernels_.moments(w, data_, weights_.view(), pivots_.data(), begin, end, sums);
  }

  void finish(int64_t c, double first, double second) const {
    if (n_ == 0) {
      means_[c] = m2s_[c] = 0;
      return;
    }
    means_[c] = pivots_[c] + first / n_;
    const double squares = second - first * (first / n_);
    m2s_[c] = squares < 0 ? 0 : squares;  // NaN stays NaN
  }

  double mean_of(int64_t c) const { return means_[c]; }
  double variance_of(int64_t c) const { return n_ == 0 ? 0 : m2s_[c] / n_; }

 private:
  PositionWeights weights_;
  Counted counted_;

 public:
  Tensor count, mean, m2;

 private:
  const void* data_;
  double n_;
  const Kernels& kernels_;
  std::vector<double> pivots_;
  double *means_, *m2s_;
};

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
  bool in_order() const { return output_.in_order; }

 private:
  OptionalTensor residual_;
  Output output_;
  Forward tensors_;
  Affine affine_;
  const Kernels& kernels_;
};

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
  PositionWeights weights;

  // The variance is spread / divisor.
  Gradient(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& spread, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual_, double eps, int64_t channel_dim,
           const OptionalString& activation, const OptionalTensor& mask, double divisor = 1)
      : input(x, channel_dim),
        schedule(input.walk, input.tensor.element_size()),
        dy(input.aligned(dy_, "dy")),
        residual(input.aligned(residual_, "residual")),
        norm(input, schedule.repeat(), weight, bias, eps, activation),
        affine(norm.affine()),
        slope(input, schedule.repeat()),
        offset(input, schedule.repeat()),
        weights(input, channel_dim, mask) {
    norm.set_all(mean, spread, divisor);
  }

  Backward tensors() const {
    return {dy.const_data_ptr(), input.data(), residual ? residual->const_data_ptr() : nullptr,
            nullptr,             nullptr,      false,
            weights.view()};
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
  bool in_order() const { return dx_.in_order; }

 private:
  Output dx_;
  std::optional<Output> dresidual_;
  Backward tensors_;
  Affine affine_;
  Slopes slopes_;
  const Kernels& kernels_;
};

}  // namespace
}  // namespace batchnorm
