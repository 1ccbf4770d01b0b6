// A mask: how much each position of an input counts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "host/domains.hpp"
#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// --- counts ----------------------------------------------------------------------------------------------------------

// How much of an input, or of a domain's samples, counts.
struct Count {
  double sum;            // of the positions, or of their sample weights
  int64_t first = 0;     // the first position that counts, if any does
  bool integral = true;  // without a mask, or by booleans
};

// `Moments.count`; of several domains one for each.
Tensor count_tensor(const std::vector<Count>& counts, bool one) {
  const bool integral = counts.front().integral;
  const int64_t size = static_cast<int64_t>(counts.size()), stride = 1;
  Tensor t = allocate(one ? 0 : 1, &size, &stride, integral ? aoti_torch_dtype_int64() : aoti_torch_dtype_float64());
  for (int64_t i = 0; i < size; ++i)
    if (integral)
      t.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(counts[i].sum);
    else
      t.mutable_data_ptr<double>()[i] = counts[i].sum;
  return t;
}

// How many of n booleans are set: counted in bytes as long as that fits, which the compiler does by whole vectors.
double total(const uint8_t* p, int64_t n) {
  int64_t sum = 0;
  while (n > 0) {
    const int64_t chunk = std::min<int64_t>(n, 240);
    uint8_t set = 0;
    for (int64_t i = 0; i < chunk; ++i) set += p[i] != 0;
    sum += set, p += chunk, n -= chunk;
  }
  return static_cast<double>(sum);
}

// The sum of n sample weights: several at once, because an addition waits for the one before it.
template <class W>
double total(const W* p, int64_t n) {
  constexpr int64_t several = 8;
  double sums[several] = {};
  for (; n >= several; p += several, n -= several)
    for (int64_t i = 0; i < several; ++i) sums[i] += static_cast<double>(p[i]);
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(p[i]);
  return std::accumulate(sums, sums + several, 0.0);
}

// On all threads; in parts of a fixed size, so that the sum does not depend on the number of threads.
template <class W>
Count count_of(const W* values, int64_t n) {
  constexpr int64_t part = 1 << 16;
  std::vector<double> sums((n + part - 1) / part);
  torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = total(values + i * part, std::min(part, n - i * part));
  });
  const auto counts = [](auto sample_weight) { return sample_weight > 0; };
  const auto first_part = std::find_if(sums.begin(), sums.end(), counts);
  Count count{std::accumulate(sums.begin(), sums.end(), 0.0)};
  if (first_part != sums.end())
    count.first = std::find_if(values + (first_part - sums.begin()) * part, values + n, counts) - values;
  count.integral = std::is_same_v<W, uint8_t>;
  return count;
}

// --- memory order ----------------------------------------------------------------------------------------------------

// A mask in the order in which the input's positions lie in memory: its own values where they have that order, or one
// copy.
class MaskInput {
 public:
  MaskInput(const Input& input, int64_t channel_dim, const OptionalTensor& mask) : positions_(input.extents.count()) {
    if (!mask) return;
    values_ = in_order(*mask, input.tensor, channel_dim < 0 ? channel_dim + input.tensor.dim() : channel_dim);
    view_ = {type_of(*values_), values_->const_data_ptr(), input.extents.channels};
  }

  const Mask& view() const { return view_; }

  // Of each domain.
  std::vector<Count> counts(const Domains& domains) const {
    switch (view_.type) {
      case MaskType::boolean: return counts_as<uint8_t>(domains);
      case MaskType::float32: return counts_as<float>(domains);
      case MaskType::float64: return counts_as<double>(domains);
      default: break;
    }
    if (!domains) return {{static_cast<double>(positions_)}};
    std::vector<Count> found(domains.number, {0.0});
    const int64_t sample = positions_ / std::max<int64_t>(1, domains.samples());
    const std::vector<int64_t> samples = domains.counts(), firsts = domains.firsts();
    for (int64_t d = 0; d < domains.number; ++d) {
      found[d].sum = static_cast<double>(samples[d] * sample);
      found[d].first = std::max<int64_t>(0, firsts[d]) * sample;
    }
    return found;
  }

 private:
  template <class W>
  std::vector<Count> counts_as(const Domains& domains) const {
    const W* values = static_cast<const W*>(view_.values);
    if (!domains) return {count_of(values, positions_)};
    std::vector<Count> found(domains.number, {0.0, 0, std::is_same_v<W, uint8_t>});
    const int64_t n = domains.samples(), sample = positions_ / std::max<int64_t>(1, n);
    std::vector<double> sums(n);
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, sample)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) sums[i] = total(values + i * sample, sample);
                                });
    for (int64_t i = 0; i < n; ++i) {
      Count& count = found[domains.of_sample(i)];
      if (count.sum == 0 && sums[i] > 0)
        count.first = std::find_if(values + i * sample, values + (i + 1) * sample, [](W w) { return w > 0; }) - values;
      count.sum += sums[i];
    }
    return found;
  }

  static MaskType type_of(const Tensor& values) {
    switch (values.scalar_type()) {
      case ScalarType::Bool: return MaskType::boolean;
      case ScalarType::Double: return MaskType::float64;
      default: return MaskType::float32;
    }
  }

  static Tensor in_order(const Tensor& mask, const Tensor& x, int64_t axis) {
    const int64_t rank = mask.dim();
    const auto dim_of_x = [&](int64_t d) { return d < axis ? d : d + 1; };
    bool fits = mask.is_cpu() && rank == x.dim() - 1;
    for (int64_t d = 0; fits && d < rank; ++d) fits = mask.size(d) == x.size(dim_of_x(d));
    if (!fits)
      refuse("got a mask, ", described(mask), ", for x ", described(x), "; it must have x's shape without the channels",
             ", on the CPU");
    check_storage(mask, "mask");

    std::vector<int64_t> order(rank), strides(rank);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return x.stride(dim_of_x(a)) < x.stride(dim_of_x(b)); });
    bool same = true;
    int64_t stride = 1;
    for (const int64_t d : order) {
      strides[d] = stride;
      stride *= mask.size(d);
      same &= mask.size(d) == 1 || mask.stride(d) == strides[d];
    }
    int32_t dtype = dtype_code(mask);
    if (mask.scalar_type() != ScalarType::Bool)
      with_element(mask, "mask", [&]<class T>() {
        if (sizeof(T) < sizeof(float)) dtype = aoti_torch_dtype_float32();  // which holds half precision exactly
      });
    if (same && dtype == dtype_code(mask)) return mask;
    Tensor copy = allocate(rank, mask.sizes().data(), strides.data(), dtype);
    return torch::stable::copy_(copy, mask);
  }

  int64_t positions_;
  OptionalTensor values_;
  Mask view_;
};

}  // namespace
}  // namespace batchnorm
