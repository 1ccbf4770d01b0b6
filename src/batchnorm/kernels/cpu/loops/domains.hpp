// Ranges of samples of several domains, part by part, and the tables from a domain's row on.
#pragma once

#include <cstdint>

#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// Where the row of the value at `begin` starts in the tables. `end` becomes the end of the samples of its domain there.
__attribute__((noinline)) int64_t domain_at(const Extents& e, int64_t begin, int64_t& end) {
  const int64_t* domain = e.domains + begin / e.sample;
  const int64_t row = *domain;
  int64_t stop = (begin / e.sample + 1) * e.sample;
  while (stop < end && *++domain == row) stop += e.sample;
  if (stop < end) end = stop;
  return row * e.channels;
}

// part(start of its domain's row, begin, end) for the parts of a range that are of one domain each.
template <class Part>
BN_INLINE void for_each_domain(const Extents& e, int64_t begin, int64_t end, Part part) {
  while (begin < end) {
    int64_t stop = end;
    const int64_t row = e.domains ? domain_at(e, begin, stop) : 0;
    part(row, begin, stop);
    begin = stop;
  }
}

BN_INLINE PerChannel from(const PerChannel& v, int64_t row) {
  return {v.exact ? v.exact + row : nullptr, v.rounded ? v.rounded + row : nullptr};
}

BN_INLINE Affine from(const Affine& a, int64_t row) {
  return {from(a.mean, row), from(a.scale, row), from(a.shift, row), a.activation};
}

BN_INLINE GradCoefficients from(const GradCoefficients& g, int64_t row) {
  return {from(g.slope, row), from(g.offset, row), g.constants};
}

BN_INLINE Sums from(const Sums& s, int64_t row) { return {s.first + row, s.second + row}; }

}  // namespace
}  // namespace batchnorm
