// Samples of several domains: which each is of, and tables with a row of one value for each channel for each domain.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// The domain of each sample of an input, (N,) int64, checked; nothing where all samples have one.
struct Domains {
  bool given = false;
  int64_t number = 1;

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
    given = true, number = number_, samples_ = domain->size(0);
    if (samples_ == 0) return;
    of_sample_ = domain->const_data_ptr<int64_t>();
    if (const int64_t stride = domain->stride(0); stride != 1) {
      copy_.resize(samples_);
      for (int64_t i = 0; i < samples_; ++i) copy_[i] = of_sample_[i * stride];
      of_sample_ = copy_.data();
    }
    bool wrong = false;
    if (number <= kFewDomains) {
      bytes_.resize(samples_);
      uint64_t bits = 0;
      for (int64_t i = 0; i < samples_; ++i) bits |= static_cast<uint64_t>(of_sample_[i]);
      const int64_t* from = of_sample_;
      uint8_t* to = bytes_.data();
      for (int64_t i = 0; i < samples_; ++i) to[i] = static_cast<uint8_t>(from[i]);
      uint8_t most = 0;
      for (int64_t i = 0; i < samples_; ++i) most = std::max(most, to[i]);
      wrong = bits >= kFewDomains || most >= number;
    } else {
      for (int64_t i = 0; i < samples_; ++i)
        wrong |= static_cast<uint64_t>(of_sample_[i]) >= static_cast<uint64_t>(number);
    }
    for (int64_t i = 0; wrong; ++i)
      if (of_sample_[i] < 0 || of_sample_[i] >= number)
        refuse("got domain ", of_sample_[i], " of sample ", i, "; it must lie in [0, ", number - 1, "]");
  }

  Domains(const Domains&) = delete;  // may point into itself

  explicit operator bool() const { return given; }

  int64_t samples() const { return samples_; }
  int64_t of_sample(int64_t i) const { return of_sample_[i]; }

  // The domain of each sample again, in bytes, of which a vector holds many; null for more than kFewDomains.
  static constexpr int64_t kFewDomains = 64;
  const uint8_t* bytes() const { return number <= kFewDomains ? bytes_.data() : nullptr; }

  // The first sample of each domain; -1 of one without any.
  std::vector<int64_t> firsts() const {
    std::vector<int64_t> found(number, -1);
    for (int64_t d = 0; bytes_.size() > 0 && d < number; ++d)
      if (const void* at = std::memchr(bytes_.data(), static_cast<int>(d), samples_); at)
        found[d] = static_cast<const uint8_t*>(at) - bytes_.data();
    for (int64_t i = bytes_.empty() ? samples_ - 1 : -1; i >= 0; --i) found[of_sample_[i]] = i;
    return found;
  }

  // How many samples each domain has.
  std::vector<int64_t> counts() const {
    constexpr int64_t several = 4;  // counters: an addition waits for the one before it
    std::vector<int64_t> of_each(several * number);
    if (number <= 2 * several) {  // by whole vectors of bytes, as long as the counts fit into them
      for (int64_t begin = 0; begin < samples_; begin += 240)
        for (int64_t d = 0; d < number; ++d)
          of_each[d] += equal_to(d, bytes_.data() + begin, std::min<int64_t>(samples_ - begin, 240));
      of_each.resize(number);
      return of_each;
    }
    int64_t i = 0;
    for (; i + several <= samples_; i += several)
      for (int64_t k = 0; k < several; ++k) ++of_each[k * number + of_sample_[i + k]];
    for (; i < samples_; ++i) ++of_each[of_sample_[i]];
    for (int64_t d = number; d < several * number; ++d) of_each[d % number] += of_each[d];
    of_each.resize(number);
    return of_each;
  }

  // Some samples of each domain, `most` at most, from all over the batch: of a few samples that are looked at.
  std::vector<std::vector<int64_t>> some(int64_t most) const {
    std::vector<std::vector<int64_t>> found(number);
    std::vector<int64_t> seen(number), every(number, 1);
    const int64_t looks = std::min(samples_, 64 * most * number);
    for (int64_t k = 0; k < looks; ++k) {
      // Not at equal distances, which may be those of a domain's samples.
      const int64_t first = samples_ / looks * k + std::min(k, samples_ % looks);
      const int64_t distance = samples_ / looks + (k < samples_ % looks);
      const int64_t i = first + static_cast<int64_t>((static_cast<uint64_t>(k) * 0x9E3779B97F4A7C15 >> 33) % distance);
      const int64_t d = of_sample_[i];
      if (seen[d]++ % every[d] != 0) continue;
      if (static_cast<int64_t>(found[d].size()) == most) {  // every second one goes, and of the next, too
        for (int64_t j = 0; 2 * j < most; ++j) found[d][j] = found[d][2 * j];
        found[d].resize((most + 1) / 2);
        every[d] *= 2;
        if ((seen[d] - 1) % every[d] != 0) continue;
      }
      found[d].push_back(i);
    }
    return found;
  }

  // The input's extents with them.
  Extents in(const Input& input) const {
    Extents e = input.extents;
    if (samples_ > 0) e.domains = of_sample_, e.sample = e.size() / samples_;
    return e;
  }

 private:
  // How many of n bytes, 255 at most, are this one.
  static uint8_t equal_to(int64_t value, const uint8_t* bytes, int64_t n) {
    const auto byte = static_cast<uint8_t>(value);
    uint8_t equal = 0;
    for (int64_t i = 0; i < n; ++i) equal += bytes[i] == byte;
    return equal;
  }

  int64_t samples_ = 0;
  const int64_t* of_sample_ = nullptr;
  std::vector<int64_t> copy_;
  std::vector<uint8_t> bytes_;
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
