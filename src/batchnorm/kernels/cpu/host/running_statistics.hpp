// Running statistics, and how moments are blended into them.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "host/domains.hpp"
#include "host/errors.hpp"
#include "host/tensors.hpp"

namespace batchnorm {
namespace {

// Calls f(the number), by reference, of a counter: of any integer or floating dtype, as torch's layers take it.
template <class F>
void with_counter(const Tensor& t, const char* name, const F& f) {
  void* p = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Long: return f(*static_cast<int64_t*>(p));
    case ScalarType::Int: return f(*static_cast<int32_t*>(p));
    case ScalarType::Short: return f(*static_cast<int16_t*>(p));
    case ScalarType::Char: return f(*static_cast<int8_t*>(p));
    case ScalarType::Byte: return f(*static_cast<uint8_t*>(p));
    default: with_element(t, name, [&]<class T>() { f(*static_cast<T*>(p)); });
  }
}

// One running statistic: its old values, and what becomes of them.
class RunningStatistic {
 public:
  RunningStatistic(const Tensor& t, int64_t channels, const char* name) : tensor_(t), old(read(t, channels, name)) {
    check_writable(t, name);
  }

 private:
  Tensor tensor_;

 public:
  std::vector<double> old;

  // (1 - factor) old + factor added, rounded once; without a value where that is not finite. A NaN stands for it.
  std::vector<double> blended(const std::vector<double>& added, double factor) const {
    std::vector<double> out(old.size());
    with_element(tensor_, "running statistics", [&]<class T>() {
      for (size_t c = 0; c < out.size(); ++c)
        out[c] = static_cast<double>(static_cast<T>((1 - factor) * old[c] + factor * added[c]));
    });
    return out;
  }

  void write(const std::vector<double>& values, const std::vector<char>& skipped) const {
    with_element(tensor_, "running statistics", [&]<class T>() {
      T* p = static_cast<T*>(tensor_.mutable_data_ptr());
      const int64_t stride = tensor_.stride(0);
      for (size_t c = 0; c < values.size(); ++c)
        if (!skipped[c]) p[c * stride] = static_cast<T>(values[c]);
    });
  }
};

// Everything is checked before anything is written. `domain`: of moments of several, which.
void commit(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& num_batches_tracked,
            const OptionalTensor& num_batches_skipped, const Tensor& count, const Tensor& mean, const Tensor& m2,
            std::optional<double> momentum, std::optional<int64_t> domain) {
  const double n = domain ? read_count_of(count, *domain) : read_count(count);
  const int64_t channels = domain && mean.dim() == 2 ? mean.size(1) : mean.numel();
  const auto means = domain ? read_row(mean, *domain, channels, "mean") : read(mean, channels, "mean");
  auto variances = domain ? read_row(m2, *domain, channels, "m2") : read(m2, channels, "m2");
  const RunningStatistic old_mean(running_mean, channels, "running_mean");
  const RunningStatistic old_var(running_var, channels, "running_var");
  double batches = 0;
  if (num_batches_tracked) {
    if (num_batches_tracked->numel() != 1 || !num_batches_tracked->is_cpu())
      refuse("got num_batches_tracked ", described(*num_batches_tracked), "; it must be one number on the CPU");
    check_storage(*num_batches_tracked, "num_batches_tracked");
    with_counter(*num_batches_tracked, "num_batches_tracked",
                 [&](const auto& value) { batches = static_cast<double>(value); });
  }
  if (num_batches_skipped) {
    const Tensor& t = *num_batches_skipped;
    if (t.scalar_type() != ScalarType::Long || !t.is_cpu() || t.dim() != 1 || t.size(0) != channels)
      refuse("got num_batches_skipped ", described(t), "; it must be int64 of shape (", channels, ",) on the CPU");
    check_storage(t, "num_batches_skipped");
    check_writable(t, "num_batches_skipped");
  }

  if (n == 0) return;
  double factor = momentum.value_or(0), counted = 1;
  if (!momentum) {
    if (!num_batches_tracked) return;
    if (batches == 0) {
      // Statistics that were loaded without their number of batches count as one batch.
      bool initial = true;
      for (int64_t c = 0; c < channels; ++c) initial &= old_mean.old[c] == 0 && old_var.old[c] == 1;
      if (!initial) ++counted;
    }
    factor = 1 / (batches + counted);
  }
  for (double& variance : variances) variance /= n - 1;
  const auto new_mean = old_mean.blended(means, factor), new_var = old_var.blended(variances, factor);
  std::vector<char> skipped(channels);
  for (int64_t c = 0; c < channels; ++c)
    skipped[c] = !(n > 1 && std::isfinite(means[c]) && std::isfinite(variances[c]) && std::isfinite(new_mean[c]) &&
                   std::isfinite(new_var[c]));

  old_mean.write(new_mean, skipped);
  old_var.write(new_var, skipped);
  if (num_batches_skipped) {
    int64_t* p = num_batches_skipped->mutable_data_ptr<int64_t>();
    const int64_t stride = num_batches_skipped->stride(0);
    for (int64_t c = 0; c < channels; ++c) p[c * stride] += skipped[c];
  }
  if (num_batches_tracked)
    with_counter(*num_batches_tracked, "num_batches_tracked", [&](auto& value) {
      using T = std::remove_reference_t<decltype(value)>;
      if constexpr (std::is_integral_v<T>)
        value = static_cast<T>(value + static_cast<T>(counted));
      else
        value = static_cast<T>(static_cast<double>(value) + counted);
    });
}

}  // namespace
}  // namespace batchnorm
