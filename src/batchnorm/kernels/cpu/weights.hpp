// How much each position of an input counts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "tensors.hpp"

namespace batchnorm {
namespace {

// The weights of a mask in the order in which the input's positions lie in memory; one for each of its values where
// rows are joined (`repeat` > 1), whose neighbours belong to different positions.
class PositionWeights {
 public:
  PositionWeights(const Input& input, int64_t channel_dim, int64_t repeat, const OptionalTensor& mask) {
    if (!mask) return;
    const Tensor& x = input.tensor;
    const int64_t axis = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
    bool fits = mask->is_cpu() && mask->dim() == x.dim() - 1;
    for (int64_t d = 0; fits && d < mask->dim(); ++d) fits = mask->size(d) == x.size(d < axis ? d : d + 1);
    STD_TORCH_CHECK(fits, "batchnorm: mask must have x's shape without the channels, on the CPU");
    std::vector<Dimension> order;
    for (int64_t d = 0; d < mask->dim(); ++d)
      if (mask->size(d) != 1) order.push_back({x.stride(d < axis ? d : d + 1), mask->size(d), mask->stride(d)});
    std::sort(order.begin(), order.end(), [](const Dimension& a, const Dimension& b) { return a.place > b.place; });
    values_.resize(mask->numel());
    double* to = values_.data();
    if (mask->scalar_type() == ScalarType::Bool)
      copy(static_cast<const uint8_t*>(mask->const_data_ptr()), order, 0, to);
    else
      with_element(*mask, "mask", [&](auto* type) {
        copy(static_cast<decltype(type)>(mask->const_data_ptr()), order, 0, to);
      });
    for (const double w : values_) total_ += w;
    first_ = std::find_if(values_.begin(), values_.end(), [](double w) { return w > 0; }) - values_.begin();
    if (total_ == 0) first_ = 0;
    integral_ = mask->scalar_type() == ScalarType::Bool;
    if (repeat > 1) {
      each_value_ = true;
      std::vector<double> spread(values_.size() * input.walk.channels);
      for (size_t i = 0; i < values_.size(); ++i)
        std::fill_n(spread.begin() + i * input.walk.channels, input.walk.channels, values_[i]);
      values_ = std::move(spread);
    }
  }

  Weights view() const { return {values_.empty() ? nullptr : values_.data(), each_value_}; }

  // A position that counts, if any does.
  int64_t first() const { return first_; }

  // How many positions count, or their weights' sum: `Moments.count`.
  Tensor count(const Input& input) const {
    const double n = sum(input);
    Tensor t = allocate(0, nullptr, nullptr, integral_ ? aoti_torch_dtype_int64() : aoti_torch_dtype_float64());
    if (integral_)
      *t.mutable_data_ptr<int64_t>() = static_cast<int64_t>(n);
    else
      *t.mutable_data_ptr<double>() = n;
    return t;
  }

  double sum(const Input& input) const {
    return values_.empty() ? static_cast<double>(input.walk.count()) : total_;
  }

 private:
  struct Dimension {
    int64_t place, size, stride;  // x's stride; the mask's size and stride
  };

  template <class T>
  static void copy(const T* from, const std::vector<Dimension>& order, size_t depth, double*& to) {
    if (depth == order.size()) {
      *to++ = static_cast<double>(*from);
      return;
    }
    const auto [place, size, stride] = order[depth];
    if (depth + 1 < order.size()) {
      for (int64_t i = 0; i < size; ++i) copy(from + i * stride, order, depth + 1, to);
    } else {
      for (int64_t i = 0; i < size; ++i) to[i] = static_cast<double>(from[i * stride]);
      to += size;
    }
  }

  std::vector<double> values_;
  double total_ = 0;
  int64_t first_ = 0;
  bool integral_ = true, each_value_ = false;
};

}  // namespace
}  // namespace batchnorm
