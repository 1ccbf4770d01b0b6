// Running statistics, and how moments are blended into them.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "host/tensors.hpp"

namespace batchnorm {
namespace {

// f(channel, a reference to its value) for every channel.
template <class F>
void each_value(const Tensor& running, int64_t channels, const char* name, const F& f) {
  STD_TORCH_CHECK(running.dim() == 1 && running.size(0) == channels && running.is_cpu(), "batchnorm: ", name,
                  " must have one value for each channel, on the CPU");
  with_element(running, name, [&]<class T>() {
    T* p = static_cast<T*>(running.mutable_data_ptr());
    const int64_t stride = running.stride(0);
    for (int64_t c = 0; c < channels; ++c) f(c, p[c * stride]);
  });
}

void commit(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& num_batches_tracked,
            const OptionalTensor& num_batches_skipped, const Tensor& count, const Tensor& mean, const Tensor& m2,
            std::optional<double> momentum) {
  const double n = read_count(count);
  if (n == 0) return;
  const int64_t channels = mean.numel();
  const auto means = read(mean, channels, "mean");
  auto variances = read(m2, channels, "m2");
  std::vector<char> skipped(channels);
  for (int64_t c = 0; c < channels; ++c) {
    variances[c] /= n - 1;
    skipped[c] = !(n > 1 && std::isfinite(means[c]) && std::isfinite(variances[c]));
  }
  int64_t* batches = num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  double factor = momentum.value_or(0);
  int64_t counted = batches ? *batches + 1 : 0;
  if (!momentum) {
    if (!batches) return;
    if (*batches == 0) {
      // Statistics that were loaded without their number of batches count as one batch.
      bool initial = true;
      const auto check = [&](double value) {
        return [&initial, value](int64_t, auto& v) { initial &= static_cast<double>(v) == value; };
      };
      each_value(running_mean, channels, "running_mean", check(0));
      each_value(running_var, channels, "running_var", check(1));
      if (!initial) ++counted;
    }
    factor = 1 / static_cast<double>(counted);
  }
  const auto blend = [&](const std::vector<double>& added) {
    return [&](int64_t c, auto& value) {
      const double old = static_cast<double>(value);
      if (!skipped[c]) value = static_cast<std::remove_reference_t<decltype(value)>>(old + (added[c] - old) * factor);
    };
  };
  each_value(running_mean, channels, "running_mean", blend(means));
  each_value(running_var, channels, "running_var", blend(variances));
  if (num_batches_skipped) {
    STD_TORCH_CHECK(num_batches_skipped->scalar_type() == ScalarType::Long && num_batches_skipped->is_cpu() &&
                        num_batches_skipped->numel() == channels && num_batches_skipped->is_contiguous(),
                    "batchnorm: num_batches_skipped must be int64 with one value for each channel, on the CPU");
    int64_t* p = num_batches_skipped->mutable_data_ptr<int64_t>();
    for (int64_t c = 0; c < channels; ++c) p[c] += skipped[c];
  }
  if (batches) *batches = counted;  // last: a refused update is not counted
}

}  // namespace
}  // namespace batchnorm
