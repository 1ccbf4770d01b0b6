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
#include "host/pool.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- memory ----------------------------------------------------------------------------------------------------------

// A new tensor on the CPU. (By the shim's own function: empty_like and new_empty are operators and go through the
// dispatcher, at three times the cost, which shows with small inputs.)
Tensor allocate(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  const auto tried = [&](AtenTensorHandle& handle) {
    return aoti_torch_empty_strided(rank, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) ==
           AOTI_TORCH_SUCCESS;
  };
  AtenTensorHandle handle = nullptr;
  if (tried(handle) || (Pool::instance().drop_idle() && tried(handle))) return Tensor(handle);
  double bytes = aoti_torch_dtype_element_size(dtype);
  for (int64_t d = 0; d < rank; ++d) bytes *= static_cast<double>(sizes[d]);
  refuse("no memory for a tensor of ", bytes / (1 << 20), " MiB. Use a smaller batch, or give memory back first");
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

// The bytes that a tensor's values lie in: [begin, end).
struct Span {
  uintptr_t begin = 0, end = 0;

  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
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
  if (t.numel() == 0) return;
  constexpr int64_t most = 16;
  const auto sizes = t.sizes(), strides = t.strides();
  std::array<int64_t, most> order;
  int64_t used = 0;
  for (int64_t d = 0; d < std::min(t.dim(), most); ++d)
    if (sizes[d] > 1) order[used++] = d;
  std::sort(order.begin(), order.begin() + used, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t reached = 0;  // by the dimensions before: the next one must step over it
  for (int64_t i = 0; i < used; ++i) {
    const int64_t d = order[i];
    if (strides[d] <= reached)
      refuse("got ", name, " ", described(t), " in which several elements share one place in memory, as in what ",
             "expand() returns; it is written in place. Use .clone() first");
    reached += (sizes[d] - 1) * strides[d];
  }
}

template <class Strides>
bool same_order(const Tensor& t, const Strides& strides) {
  const auto sizes = t.sizes(), own = t.strides();
  for (int64_t d = 0; d < t.dim(); ++d)
    if (sizes[d] != 1 && own[d] != strides[d]) return false;
  return true;
}

// Whether two tensors of one shape and dtype are the same values in memory.
bool same_place(const Tensor& a, const Tensor& b) {
  return a.data_ptr() == b.data_ptr() && same_order(a, b.strides());
}

// A dense x is written in place: what is read beside it must lie elsewhere.
void check_apart(const Tensor& x, const Tensor& other, const char* name) {
  if (span_of(x).overlaps(span_of(other)))
    refuse("got ", name, " ", described(other), " that shares memory with x ", described(x),
           ", which is written in place. Use ", name, ".clone() first");
}

// --- memory order ----------------------------------------------------------------------------------------------------

// How the values of a tensor lie in memory, or nothing where they leave gaps or overlap.
std::optional<Extents> extents_of(const Tensor& x, int64_t axis) {
  constexpr int64_t most = 16;
  const int64_t rank = x.dim();
  const auto sizes = x.sizes(), strides = x.strides();
  std::array<int64_t, most> order;
  if (rank > most) refuse("got x with ", rank, " dimensions; it may have at most ", most, ". Flatten some first");
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

// The strides of what torch returns for an input, by its own rule: what is packed in one of the two orders has it,
// contiguous first, where sizes of 1 fit both. Others are channels_last where their strides look so
// (`suggest_memory_format`), contiguous otherwise.
std::vector<int64_t> output_strides(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t rank = x.dim();
  // Of channels_last, the i-th dimension from the one that changes fastest: 1, the spatial ones from the last on, 0.
  const auto nth = [&](int64_t i) { return i == 0 ? 1 : (i == rank - 1 ? 0 : rank - i); };
  const auto packed = [&](const auto& order) {
    int64_t stride = 1;
    for (int64_t i = 0; i < rank; ++i) {
      const int64_t d = order(i);
      if (sizes[d] == 1) continue;
      if (strides[d] != stride) return false;
      stride *= sizes[d];
    }
    return true;
  };
  const auto channels_last = [&] {
    if ((rank != 4 && rank != 5) || packed([&](int64_t i) { return rank - 1 - i; })) return false;
    if (packed(nth)) return true;
    if (strides[1] == 0) return false;
    int64_t least = 0;
    for (int64_t i = 0; i < rank; ++i) {
      const int64_t d = nth(i);
      if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
      least = strides[d] * std::max<int64_t>(sizes[d], 1);
    }
    return true;
  };
  std::vector<int64_t> out(rank);
  int64_t stride = 1;
  const bool last = channels_last();
  const auto put = [&](int64_t d) {
    out[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  };
  if (last) put(1);
  for (int64_t d = rank - 1; d >= 0; --d)
    if (!last || d != 1) put(d);
  return out;
}

// In which order an input is gone through: in that of its outputs, or in its own where there are none.
enum class Order { outputs, own };

// The input in a memory order that the kernels can go through: itself, or one copy.
struct Input {
  Tensor tensor;
  std::vector<int64_t> strides;  // of outputs
  Extents extents;
  Dtype dtype;

  Input(const Tensor& x, int64_t channel_dim, Order order)
      : tensor(x), strides(output_strides(x)), extents{}, dtype{} {
    const auto type = dtype_of(x);
    if (!type || !x.is_cpu())
      refuse("got x ", described(x), "; it must be floating: float32, float64, bfloat16 or float16, on the CPU");
    if (x.dim() < 2) refuse("got x ", described(x), "; it must have at least 2 dimensions, (N, C) or (N, C, *S)");
    if (channel_dim < -x.dim() || channel_dim >= x.dim())
      refuse("got channel_dim=", channel_dim, " for x ", described(x), "; it must lie in [", -x.dim(), ", ",
             x.dim() - 1, "]");
    dtype = *type;
    const int64_t axis = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
    if (x.numel() == 0) {
      extents = Extents{1, x.size(axis), 1};  // without channels there are positions all the same
      for (int64_t d = 0; d < x.dim(); ++d) extents.outer *= d == axis ? 1 : x.size(d);
      return;
    }
    check_storage(x, "x");
    auto found = order == Order::outputs && !same_order(x, strides) ? std::nullopt : extents_of(x, axis);
    if (!found) {
      tensor = allocate(x.dim(), x.sizes().data(), strides.data(), dtype_code(x));
      torch::stable::copy_(tensor, x);
      found = extents_of(tensor, axis);
    }
    extents = *found;
  }

  const void* data() const { return tensor.const_data_ptr(); }

  // Another tensor of the input's shape and dtype, in the input's memory order: itself, or one copy.
  Tensor aligned(const Tensor& other, const char* name) const {
    bool fits = other.scalar_type() == tensor.scalar_type() && other.is_cpu() && other.dim() == tensor.dim();
    for (int64_t d = 0; fits && d < other.dim(); ++d) fits = other.size(d) == tensor.size(d);
    if (!fits)
      refuse("got ", name, " ", described(other), " for x ", described(tensor), "; it must have x's shape and dtype, ",
             "on the CPU");
    check_storage(other, name);
    return same_order(other, tensor.strides()) ? other : copy(other);
  }

  // Another tensor's values in new memory, in the input's order.
  Tensor copy(const Tensor& other) const {
    Tensor out = allocate(tensor.dim(), tensor.sizes().data(), tensor.strides().data(), dtype_code(tensor));
    return torch::stable::copy_(out, other);
  }

  OptionalTensor aligned(const OptionalTensor& other, const char* name) const {
    return other ? OptionalTensor(aligned(*other, name)) : std::nullopt;
  }

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

}  // namespace
}  // namespace batchnorm
