// Samples of several domains: which each is of, and tables with a row of one value for each channel for each domain.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// The domain of each sample of an input, (N,) int64, checked; nothing where all samples have one.
struct Domains {
  bool given = false;
  int64_t number = 1;
  std::vector<int64_t> of_sample;

  Domains(const Input& input, int64_t channel_dim, const OptionalTensor& domain, int64_t number_) {
    if (!domain) return;
    const Tensor& x = input.tensor;
    if (channel_dim == 0 || channel_dim == -x.dim())
      refuse("got domains for x ", described(x), " with the channels in its first dimension; the samples must be there");
    if (number_ < 1) refuse("got ", number_, " domains; there must be at least one");
    if (domain->scalar_type() != ScalarType::Long || !domain->is_cpu() || domain->dim() != 1 ||
        domain->size(0) != x.size(0))
      refuse("got domain ", described(*domain), " for x ", described(x), "; it must be int64 of shape (", x.size(0),
             ",), on the CPU");
    check_storage(*domain, "domain");
    given = true, number = number_;
    const int64_t n = domain->size(0), stride = domain->stride(0);
    const int64_t* p = n ? domain->const_data_ptr<int64_t>() : nullptr;
    of_sample.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      of_sample[i] = p[i * stride];
      if (of_sample[i] < 0 || of_sample[i] >= number)
        refuse("got domain ", of_sample[i], " of sample ", i, "; it must lie in [0, ", number - 1, "]");
    }
  }

  explicit operator bool() const { return given; }

  int64_t samples() const { return static_cast<int64_t>(of_sample.size()); }

  // The samples of a domain.
  std::vector<int64_t> samples_of(int64_t domain) const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < samples(); ++i)
      if (of_sample[i] == domain) found.push_back(i);
    return found;
  }

  // The input's extents with them.
  Extents in(const Input& input) const {
    Extents e = input.extents;
    if (samples() > 0) e.domains = of_sample.data(), e.sample = e.size() / samples();
    return e;
  }
};

// A table's values, row by row: (number, C), or (C,) for the same in each row.
std::vector<double> read_table(const Tensor& t, const Domains& domains, int64_t channels, const char* name) {
  if (t.dim() == 1 || !domains) {
    std::vector<double> out = read(t, channels, name);
    out.resize(domains.number * channels);
    for (int64_t i = channels; i < static_cast<int64_t>(out.size()); ++i) out[i] = out[i - channels];
    return out;
  }
  if (t.dim() != 2 || t.size(0) != domains.number || t.size(1) != channels || !t.is_cpu())
    refuse("got ", name, " ", described(t), "; it must have one value for each domain and channel, shape (",
           domains.number, ", ", channels, "), on the CPU");
  check_storage(t, name);
  std::vector<double> out(domains.number * channels);
  with_element(t, name, [&]<class T>() {
    const T* p = static_cast<const T*>(t.const_data_ptr());
    for (int64_t d = 0, i = 0; d < domains.number; ++d)
      for (int64_t c = 0; c < channels; ++c, ++i) out[i] = static_cast<double>(p[d * t.stride(0) + c * t.stride(1)]);
  });
  return out;
}

std::vector<double> read_table(const OptionalTensor& t, const Domains& domains, int64_t channels, const char* name,
                               double fallback) {
  return t ? read_table(*t, domains, channels, name) : std::vector<double>(domains.number * channels, fallback);
}

// A new tensor for a table of float64.
Tensor allocate_table(const Domains& domains, int64_t channels) {
  if (!domains) return allocate_vector(channels, aoti_torch_dtype_float64());
  const int64_t sizes[] = {domains.number, channels}, strides[] = {channels, 1};
  return allocate(2, sizes, strides, aoti_torch_dtype_float64());
}

// The gradient of a parameter, from a table of sums: of `like`'s dtype and shape, where (C,) is the sum of all rows.
// Without one the table itself.
Tensor gradient_of(std::vector<double> sums, const Domains& domains, int64_t channels, const OptionalTensor& like) {
  if (domains && like && like->dim() == 1) {
    for (int64_t i = channels; i < static_cast<int64_t>(sums.size()); ++i) sums[i % channels] += sums[i];
    sums.resize(channels);
  }
  if (!domains || (like && like->dim() == 1)) return vector_of(sums, like);
  const int64_t sizes[] = {domains.number, channels}, strides[] = {channels, 1};
  Tensor out = allocate(2, sizes, strides, like ? dtype_code(*like) : aoti_torch_dtype_float64());
  with_element(out, "a parameter", [&]<class T>() {
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (const double sum : sums) *to++ = static_cast<T>(sum);
  });
  return out;
}

// One row of a table.
std::vector<double> read_row(const Tensor& t, int64_t row, int64_t channels, const char* name) {
  if (t.dim() != 2 || row < 0 || row >= t.size(0) || t.size(1) != channels || !t.is_cpu())
    refuse("got ", name, " ", described(t), " for domain ", row, "; it must have a row of ", channels,
           " values for each domain, on the CPU");
  check_storage(t, name);
  std::vector<double> out(channels);
  with_element(t, name, [&]<class T>() {
    const T* p = static_cast<const T*>(t.const_data_ptr()) + row * t.stride(0);
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<double>(p[c * t.stride(1)]);
  });
  return out;
}

// The count of one domain, of a count for each.
double read_count_of(const Tensor& t, int64_t domain) {
  const bool integral = t.scalar_type() == ScalarType::Long;
  if (t.dim() != 1 || domain < 0 || domain >= t.size(0) || !t.is_cpu() ||
      !(integral || t.scalar_type() == ScalarType::Double))
    refuse("got count ", described(t), " for domain ", domain, "; it must have one number for each domain, int64 or ",
           "float64, on the CPU");
  check_storage(t, "count");
  return integral ? static_cast<double>(t.const_data_ptr<int64_t>()[domain * t.stride(0)])
                  : t.const_data_ptr<double>()[domain * t.stride(0)];
}

// A count for each domain, (number,), or one, (): int64, or float64 with sample weights.
std::vector<double> read_counts(const Tensor& t, const Domains& domains) {
  if (!domains) return {read_count(t)};
  std::vector<double> out(domains.number);
  for (int64_t d = 0; d < domains.number; ++d) out[d] = read_count_of(t, d);
  return out;
}

}  // namespace
}  // namespace batchnorm
