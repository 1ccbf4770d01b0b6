// From torch's tensors to pointers: what is accepted, and how it lies in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "host/errors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- memory ----------------------------------------------------------------------------------------------------------

// The bytes that a tensor's values lie in: [begin, end).
struct Span {
  uintptr_t begin = 0, end = 0;

  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
  bool operator==(const Span&) const = default;
};

Span span_of(const Tensor& t) {
  if (t.numel() == 0) return {};
  int64_t last = 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t d = 0; d < t.dim(); ++d) last += (sizes[d] - 1) * strides[d];
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {begin, begin + (last + 1) * t.element_size()};
}

// A tensor's memory may have been freed under it: its storage resized. Nothing is read before this was asked.
void check_storage(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  int64_t bytes = 0, last = t.storage_offset();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t d = 0; d < t.dim(); ++d) last += (sizes[d] - 1) * strides[d];
  const int64_t needed = (last + 1) * static_cast<int64_t>(t.element_size());
  if (bytes < needed || t.data_ptr() == nullptr)
    refuse("got ", name, " ", described(t), " whose storage has ", bytes, " bytes; it needs ", needed,
           ". Its memory was freed or resized: give the tensor its values back before it is used");
}

// What is written in place must have a place for each value.
void check_writable(const Tensor& t, const char* name) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t d = 0; d < t.dim(); ++d)
    if (sizes[d] > 1 && strides[d] == 0)
      refuse("got ", name, " ", described(t), " in which several elements share one place in memory, as in what "
             "expand() returns; it is written in place. Use .clone() first");
}

// --- memory order ----------------------------------------------------------------------------------------------------

// A new tensor on the CPU. (By the shim's own function: empty_like and new_empty are operators and go through the
// dispatcher, at three times the cost, which shows with small inputs.)
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
std::optional<Extents> extents_of(const Tensor& x, int64_t axis) {
  constexpr int64_t most = 16;
  const int64_t rank = x.dim();
  const auto sizes = x.sizes(), strides = x.strides();
  std::array<int64_t, most> order;
  STD_TORCH_CHECK(rank <= most, "batchnorm: x must have at most 16 dimensions");
  int64_t used = 0;
  for (int64_t d = 0; d < rank; ++d)
    if (sizes[d] != 1) order[used++] = d;
  std::sort(order.begin(), order.begin() + used, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  Extents extents{1, sizes[axis], 1};
  bool inside = true;  // stays so for a single channel, which is one plane
  int64_t expected = 1;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t d = order[i];
    if (strides[d] != expected) return std::nullopt;
    expected *= sizes[d];
    if (d == axis)
      inside = false;
    else
      (inside ? extents.inner : extents.outer) *= sizes[d];
  }
  return extents;
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

// Calls f<T>(), T the type of t's elements.
template <class F>
void with_element(const Tensor& t, const char* name, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::Double: return f.template operator()<double>();
    case ScalarType::BFloat16: return f.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half: return f.template operator()<torch::headeronly::Half>();
    default: refuse("got ", name, " ", described(t), "; it must be float32, float64, bfloat16 or float16");
  }
}

// The input in a memory order that the kernels can go through: itself, or one copy.
struct Input {
  Tensor tensor;
  Extents extents;
  Dtype dtype;

  Input(const Tensor& x, int64_t channel_dim) : tensor(x), extents{}, dtype{} {
    const auto type = dtype_of(x);
    STD_TORCH_CHECK(type && x.is_cpu(), "batchnorm: x must be floating and on the CPU");
    STD_TORCH_CHECK(x.dim() >= 2 && channel_dim >= -x.dim() && channel_dim < x.dim(),
                    "batchnorm: x must have at least 2 dimensions, and channel_dim be one of them");
    dtype = *type;
    const int64_t axis = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
    if (x.numel() == 0) {
      extents = Extents{0, x.sizes()[axis], 1};
      return;
    }
    auto found = extents_of(x, axis);
    if (!found) {
      tensor = torch::stable::clone(x);
      found = extents_of(tensor, axis);
      STD_TORCH_CHECK(found, "batchnorm: a copy of x is not dense");
    }
    extents = *found;
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

  Tensor statistic() const { return allocate_vector(extents.channels, aoti_torch_dtype_float64()); }

  // The value of every channel at a position; positions are counted in memory order.
  void values_at(int64_t position, double* out) const {
    with_element(tensor, "x", [&]<class T>() {
      const T* p = static_cast<const T*>(data());
      p += position / extents.inner * extents.channels * extents.inner + position % extents.inner;
      for (int64_t c = 0; c < extents.channels; ++c) out[c] = static_cast<double>(p[c * extents.inner]);
    });
  }
};

// --- vectors of one value for each channel ---------------------------------------------------------------------------

std::vector<double> read(const Tensor& t, int64_t channels, const char* name) {
  if (t.dim() != 1 || t.size(0) != channels || !t.is_cpu())
    refuse("got ", name, " ", described(t), "; it must have one value for each channel, shape (", channels,
           ",), on the CPU");
  check_storage(t, name);
  std::vector<double> out(channels);
  with_element(t, name, [&]<class T>() {
    const T* p = static_cast<const T*>(t.const_data_ptr());
    const int64_t stride = t.stride(0);
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<double>(p[c * stride]);
  });
  return out;
}

// A new tensor of these values: float64, or rounded to another's dtype.
Tensor vector_of(const std::vector<double>& values, const OptionalTensor& like) {
  const auto size = static_cast<int64_t>(values.size());
  Tensor out = allocate_vector(size, like ? dtype_code(*like) : aoti_torch_dtype_float64());
  with_element(out, "a parameter", [&]<class T>() {
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t c = 0; c < size; ++c) to[c] = static_cast<T>(values[c]);
  });
  return out;
}

// A count: () int64, or float64 with sample weights.
double read_count(const Tensor& t) {
  const bool known = t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Double;
  if (t.numel() != 1 || !t.is_cpu() || !known)
    refuse("got count ", described(t), "; it must be one number, int64 or float64, on the CPU");
  check_storage(t, "count");
  if (t.scalar_type() == ScalarType::Long) return static_cast<double>(*t.const_data_ptr<int64_t>());
  return *t.const_data_ptr<double>();
}

std::vector<double> read(const OptionalTensor& t, int64_t channels, const char* name, double fallback) {
  return t ? read(*t, channels, name) : std::vector<double>(channels, fallback);
}

}  // namespace
}  // namespace batchnorm
