// From torch's tensors to pointers: what is accepted, and how it lies in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.hpp"

namespace batchnorm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- memory order ----------------------------------------------------------------------------------------------------

// How the values of a tensor lie in memory, or nothing where they leave gaps or overlap.
std::optional<Walk> walk_of(const Tensor& x, int64_t axis) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  Walk walk{1, sizes[axis], 1};
  bool inside = sizes[axis] != 1;  // a single channel is one plane
  int64_t expected = 1;
  for (int64_t d : order) {
    if (strides[d] != expected) return std::nullopt;
    expected *= sizes[d];
    if (d == axis)
      inside = false;
    else
      (inside || sizes[axis] == 1 ? walk.inner : walk.outer) *= sizes[d];
  }
  return walk;
}

bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), sa = a.strides(), sb = b.strides();
  for (int64_t d = 0; d < a.dim(); ++d)
    if (sizes[d] != 1 && sa[d] != sb[d]) return false;
  return true;
}

// The input in a memory order that the kernels can walk: itself, or one copy.
struct Input {
  Tensor tensor;
  Walk walk;

  Input(const Tensor& x, int64_t channel_dim) : tensor(x), walk{} {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu(), "batchnorm: x must be float32 on the CPU");
    STD_TORCH_CHECK(x.dim() >= 2 && channel_dim >= -x.dim() && channel_dim < x.dim(),
                    "batchnorm: x must have at least 2 dimensions, and channel_dim be one of them");
    const int64_t axis = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
    auto found = walk_of(x, axis);
    if (!found) {
      tensor = torch::stable::clone(x);
      found = walk_of(tensor, axis);
      STD_TORCH_CHECK(x.numel() == 0 || found, "batchnorm: a copy of x is not dense");
    }
    walk = found.value_or(Walk{0, x.sizes()[axis], 1});
    if (x.numel() == 0) walk.outer = 0;
  }

  const float* data() const { return tensor.const_data_ptr<float>(); }

  // Another tensor of the input's shape, in the input's memory order: itself, or one copy.
  Tensor aligned(const Tensor& other, const char* name) const {
    STD_TORCH_CHECK(other.scalar_type() == ScalarType::Float && other.is_cpu(), "batchnorm: ", name,
                    " must be float32 on the CPU");
    bool same_shape = other.dim() == tensor.dim();
    for (int64_t d = 0; same_shape && d < other.dim(); ++d) same_shape = other.sizes()[d] == tensor.sizes()[d];
    STD_TORCH_CHECK(same_shape, "batchnorm: ", name, " must have x's shape");
    if (same_order(other, tensor)) return other;
    Tensor copy = torch::stable::empty_like(tensor);
    return torch::stable::copy_(copy, other);
  }

  Tensor statistic() const { return torch::stable::new_empty(tensor, {walk.channels}, ScalarType::Double); }
};

// A new tensor of another's shape and memory order, to be written in full.
//
// The first touch of fresh memory costs more than writing it: the system maps and clears it page by page. For a large
// tensor it is asked for 2 MiB pages, where it gives them on request.
Tensor fresh_like(const Tensor& x) {
  Tensor t = torch::stable::empty_like(x);
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + page - 1) & ~(page - 1);
  const auto end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.numel() * t.element_size()) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: refusal is harmless
#endif
  return t;
}

// --- vectors of one value for each channel ---------------------------------------------------------------------------

template <class T>
void read_as(const Tensor& t, std::vector<double>& out) {
  const T* p = static_cast<const T*>(t.const_data_ptr());
  const int64_t stride = t.stride(0);
  for (size_t c = 0; c < out.size(); ++c) out[c] = static_cast<double>(p[c * stride]);
}

std::vector<double> read(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_cpu(), "batchnorm: ", name,
                  " must have one value for each channel, on the CPU");
  std::vector<double> out(channels);
  switch (t.scalar_type()) {
    case ScalarType::Double: read_as<double>(t, out); break;
    case ScalarType::Float: read_as<float>(t, out); break;
    case ScalarType::Half: read_as<torch::headeronly::Half>(t, out); break;
    case ScalarType::BFloat16: read_as<torch::headeronly::BFloat16>(t, out); break;
    default: STD_TORCH_CHECK(false, "batchnorm: ", name, " must be floating");
  }
  return out;
}

std::vector<double> read(const OptionalTensor& t, int64_t channels, const char* name, double otherwise) {
  return t ? read(*t, channels, name) : std::vector<double>(channels, otherwise);
}

}  // namespace
}  // namespace batchnorm
