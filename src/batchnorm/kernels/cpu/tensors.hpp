// From torch's tensors to pointers: what is accepted, and how it lies in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

namespace batchnorm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- memory order ----------------------------------------------------------------------------------------------------

// A new tensor on the CPU. (By the shim's own function: the operators behind empty_like and new_empty go through the
// dispatcher, at three times the cost, which small inputs feel.)
Tensor allocate(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor allocate_vector(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return allocate(1, &size, &stride, dtype);
}

int32_t dtype_code(const Tensor& t) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// How the values of a tensor lie in memory, or nothing where they leave gaps or overlap.
std::optional<Walk> walk_of(const Tensor& x, int64_t axis) {
  constexpr int64_t most = 16;
  const int64_t rank = x.dim();
  const auto sizes = x.sizes(), strides = x.strides();
  std::array<int64_t, most> order;
  STD_TORCH_CHECK(rank <= most, "batchnorm: x must have at most 16 dimensions");
  int64_t used = 0;
  for (int64_t d = 0; d < rank; ++d)
    if (sizes[d] != 1) order[used++] = d;
  std::sort(order.begin(), order.begin() + used, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  Walk walk{1, sizes[axis], 1};
  bool inside = true;  // a single channel is one plane: its dimension is never met
  int64_t expected = 1;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t d = order[i];
    if (strides[d] != expected) return std::nullopt;
    expected *= sizes[d];
    if (d == axis)
      inside = false;
    else
      (inside ? walk.inner : walk.outer) *= sizes[d];
  }
  return walk;
}

bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), sa = a.strides(), sb = b.strides();
  for (int64_t d = 0; d < a.dim(); ++d)
    if (sizes[d] != 1 && sa[d] != sb[d]) return false;
  return true;
}

std::optional<Dtype> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return std::nullopt;
  }
}

// Calls f with a null pointer to the type that `t`'s elements have.
template <class F>
void with_element(const Tensor& t, const char* name, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(static_cast<const float*>(nullptr));
    case ScalarType::Double: return f(static_cast<const double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<const torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<const torch::headeronly::Half*>(nullptr));
    default: STD_TORCH_CHECK(false, "batchnorm: ", name, " must be floating");
  }
}

// The input in a memory order that the kernels can walk: itself, or one copy.
struct Input {
  Tensor tensor;
  Walk walk;
  Dtype dtype;

  Input(const Tensor& x, int64_t channel_dim) : tensor(x), walk{}, dtype{} {
    const auto type = dtype_of(x);
    STD_TORCH_CHECK(type && x.is_cpu(), "batchnorm: x must be floating and on the CPU");
    STD_TORCH_CHECK(x.dim() >= 2 && channel_dim >= -x.dim() && channel_dim < x.dim(),
                    "batchnorm: x must have at least 2 dimensions, and channel_dim be one of them");
    dtype = *type;
    const int64_t axis = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
    if (x.numel() == 0) {
      walk = Walk{0, x.sizes()[axis], 1};
      return;
    }
    auto found = walk_of(x, axis);
    if (!found) {
      tensor = torch::stable::clone(x);
      found = walk_of(tensor, axis);
      STD_TORCH_CHECK(found, "batchnorm: a copy of x is not dense");
    }
    walk = *found;
  }

  const void* data() const { return tensor.const_data_ptr(); }

  // Another tensor of the input's shape and dtype, in the input's memory order: itself, or one copy.
  Tensor aligned(const Tensor& other, const char* name) const {
    STD_TORCH_CHECK(other.scalar_type() == tensor.scalar_type() && other.is_cpu(), "batchnorm: ", name,
                    " must have x's dtype and be on the CPU");
    bool same_shape = other.dim() == tensor.dim();
    for (int64_t d = 0; same_shape && d < other.dim(); ++d) same_shape = other.sizes()[d] == tensor.sizes()[d];
    STD_TORCH_CHECK(same_shape, "batchnorm: ", name, " must have x's shape");
    if (same_order(other, tensor)) return other;
    Tensor copy = torch::stable::empty_like(tensor);
    return torch::stable::copy_(copy, other);
  }

  OptionalTensor aligned(const OptionalTensor& other, const char* name) const {
    return other ? OptionalTensor(aligned(*other, name)) : std::nullopt;
  }

  Tensor statistic() const { return allocate_vector(walk.channels, aoti_torch_dtype_float64()); }

  // The value of every channel at a position, counted as they lie in memory.
  void values_at(int64_t position, double* out) const {
    with_element(tensor, "x", [&](auto* type) {
      const auto* p = static_cast<decltype(type)>(data());
      p += position / walk.inner * walk.channels * walk.inner + position % walk.inner;
      for (int64_t c = 0; c < walk.channels; ++c) out[c] = static_cast<double>(p[c * walk.inner]);
    });
  }
};

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
    const bool whole = values_.empty() || integral_;
    const double n = sum(input);
    Tensor t = allocate(0, nullptr, nullptr, whole ? aoti_torch_dtype_int64() : aoti_torch_dtype_float64());
    if (whole)
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

// Whether 2 MiB pages help. Not in a virtual machine that reports free pages to its host: the host takes a free 2 MiB page
// away, and giving it back costs several times what was saved, as soon as the memory of a training step lies unused for
// a second. (Measured: a layer's step of 8 ms then took 80 to 270.)
bool huge_pages_help() {
#if defined(__linux__)
  static const bool help = [] {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    const bool in_machine = __get_cpuid(1, &a, &b, &c, &d) && (c >> 31 & 1);
#else
    const bool in_machine = true;
#endif
    return !(in_machine && access("/sys/module/page_reporting", F_OK) == 0);
  }();
  return help;
#else
  return false;
#endif
}

// What is to be written in full: in memory order or in any, and past the caches or not.
struct Output {
  Tensor tensor;
  bool in_order = false, stream = false;

  // A new tensor of a dense one's shape and memory order.
  //
  // The first touch of fresh memory costs more than writing it: the system maps and clears it page by page. Where it
  // helps, 2 MiB pages are asked for; a page that was just cleared is best written at once, in memory order. Memory
  // that was used before can be written in any order, and, where the tensor is larger than the caches, past them.
  static Output like(const Tensor& x, const Walk& walk) {
    Output out{allocate(x.dim(), x.sizes().data(), x.strides().data(), dtype_code(x))};
    constexpr uintptr_t line = 64, large = 1 << 21, least = 1 << 24;  // a last-level cache may hold less than `least`
    const auto address = reinterpret_cast<uintptr_t>(out.tensor.data_ptr());
    const auto bytes = static_cast<uintptr_t>(x.numel() * x.element_size());
    const auto begin = (address + large - 1) & ~(large - 1), end = (address + bytes) & ~(large - 1);
    if (end <= begin || (bytes < least && !huge_pages_help())) return out;
    unsigned char present = 1;
#if defined(__linux__)
    auto* middle = reinterpret_cast<void*>(begin + (end - begin) / large / 2 * large);
    if (mincore(middle, 1, &present) == 0 && !(present & 1) && huge_pages_help()) {
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: refusal is harmless
      out.in_order = true;
    }
#endif
    // Cache lines that two runs share are not written as a whole; in long runs they are few.
    const auto run = static_cast<uintptr_t>((walk.rows() ? walk.channels : walk.inner) * x.element_size());
    out.stream = (present & 1) && bytes >= least && address % line == 0 && (run % line == 0 || run >= 64 * line);
    return out;
  }
};

// --- vectors of one value for each channel ---------------------------------------------------------------------------

std::vector<double> read(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_cpu(), "batchnorm: ", name,
                  " must have one value for each channel, on the CPU");
  std::vector<double> out(channels);
  with_element(t, name, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(t.const_data_ptr());
    const int64_t stride = t.stride(0);
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<double>(p[c * stride]);
  });
  return out;
}

// A new tensor of these values: float64, or rounded to another's dtype.
Tensor vector_of(const std::vector<double>& values, const OptionalTensor& like) {
  const auto size = static_cast<int64_t>(values.size());
  Tensor out = allocate_vector(size, like ? dtype_code(*like) : aoti_torch_dtype_float64());
  with_element(out, "a parameter", [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t c = 0; c < size; ++c) to[c] = static_cast<T>(values[c]);
  });
  return out;
}

// A count: () int64, or float64 where observations carry weights.
double read_count(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1 && t.is_cpu(), "batchnorm: count must be one number on the CPU");
  if (t.scalar_type() == ScalarType::Long) return static_cast<double>(*t.const_data_ptr<int64_t>());
  return *t.const_data_ptr<double>();
}

std::vector<double> read(const OptionalTensor& t, int64_t channels, const char* name, double otherwise) {
  return t ? read(*t, channels, name) : std::vector<double>(channels, otherwise);
}

}  // namespace
}  // namespace batchnorm
