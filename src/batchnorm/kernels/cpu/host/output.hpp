// Where results are written: new memory or used, in which order, through the caches or past them.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdint>

#include "host/pool.hpp"
#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// Whether 2 MiB pages help. Not in a virtual machine that reports free pages to its host: the host takes a free 2 MiB
// page away, and giving it back costs several times what was saved, as soon as the memory of a training step lies
// unused for a second (docs/numbers/performance.md).
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

  // A new tensor of an input's shape, dtype and memory order.
  //
  // The first touch of fresh memory costs more than writing it: the system maps and clears it page by page. Where it
  // helps, 2 MiB pages are asked for; a page that was just cleared is best written at once, in memory order. Memory
  // that was used before can be written in any order, and, where the tensor is larger than the caches, past them.
  static Output like(const Input& input) {
    const Tensor& x = input.tensor;
    const Extents& extents = input.extents;
    const int64_t* strides = input.strides.data();
    const auto bytes = static_cast<uintptr_t>(x.numel() * x.element_size());
    bool used = false;
    const AtenTensorHandle pooled =
        Pool::instance().tensor(bytes, x.dim(), x.sizes().data(), strides, dtype_code(x), used);
    Output out{pooled ? Tensor(pooled) : allocate(x.dim(), x.sizes().data(), strides, dtype_code(x))};
    constexpr uintptr_t line = 64, large = 1 << 21, least = 1 << 24;  // a last-level cache may hold less than `least`
    const auto address = reinterpret_cast<uintptr_t>(out.tensor.data_ptr());
    const auto begin = (address + large - 1) & ~(large - 1), end = (address + bytes) & ~(large - 1);
    if (end <= begin || (bytes < least && !huge_pages_help())) return out;
#if defined(__linux__)
    unsigned char present = 1;
    auto* middle = reinterpret_cast<void*>(begin + (end - begin) / large / 2 * large);
    if (!used) used = mincore(middle, 1, &present) != 0 || (present & 1);
    if (!used && huge_pages_help()) {
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: refusal is harmless
      out.in_order = true;
    }
#else
    used = true;
#endif
    // Cache lines that two runs share are not written as a whole; in long runs they are few.
    const auto run = static_cast<uintptr_t>((extents.rows() ? extents.channels : extents.inner) * x.element_size());
    out.stream = used && bytes >= least && address % line == 0 && (run % line == 0 || run >= 64 * line);
    return out;
  }
};

}  // namespace
}  // namespace batchnorm
