// How a range of values is walked: parts of one domain, runs of planes, rows, groups of rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// The first entry of the domain that the value at `begin` belongs to. `end` becomes the end of its samples from there.
__attribute__((noinline)) int64_t domain_at(const Extents& e, int64_t begin, int64_t& end) {
  const int64_t* domain = e.domains + begin / e.sample;
  const int64_t row = *domain;
  int64_t stop = (begin / e.sample + 1) * e.sample;
  while (stop < end && *++domain == row) stop += e.sample;
  if (stop < end) end = stop;
  return row * e.channels;
}

// part(first entry of the domain, begin, end) for the parts of the range that are of one domain each.
template <class Part>
BN_INLINE void for_each_domain(const Extents& e, int64_t begin, int64_t end, Part part) {
  while (begin < end) {
    int64_t stop = end;
    const int64_t first = e.domains ? domain_at(e, begin, stop) : 0;
    part(first, begin, stop);
    begin = stop;
  }
}

// The runs of planes in the range: run(entry of the channel, offset of the first value, length).
template <class Run>
BN_INLINE void for_each_run(const Extents& e, int64_t begin, int64_t end, Run run) {
  for_each_domain(e, begin, end, [&](int64_t first, int64_t begin, int64_t end) {
    int64_t channel = begin / e.inner % e.channels, within = begin % e.inner;
    while (begin < end) {
      const int64_t length = e.inner - within < end - begin ? e.inner - within : end - begin;
      run(first + channel, begin, length);
      begin += length, within = 0;
      if (++channel == e.channels) channel = 0;
    }
  });
}

// row(its first channel's entry, offset of its first value) for the rows in the range.
template <class Row>
BN_INLINE void for_each_whole_row(const Extents& e, int64_t begin, int64_t end, Row row) {
  for_each_domain(e, begin, end, [&](int64_t first, int64_t begin, int64_t end) {
    for (; begin < end; begin += e.channels) row(first, begin);
  });
}

template <int64_t N>
using Fixed = std::integral_constant<int64_t, N>;

// How many rows, or vectors of a run, are taken together: the sums of a channel are read and written once for the whole
// group, and a gradient's few terms are added up in their own type before they go into the float64 sum. (Moments are
// not: their differences from the pivot must not round.)
constexpr int64_t kGroup = 8;

// group(entry of the first channel, offset of the first row, Fixed<how many rows>) for the range.
template <class Group>
BN_INLINE void for_each_group(const Extents& e, int64_t begin, int64_t end, bool single, Group group) {
  for_each_domain(e, begin, end, [&](int64_t first, int64_t begin, int64_t end) {
    for (; !single && begin + kGroup * e.channels <= end; begin += kGroup * e.channels)
      group(first, begin, Fixed<kGroup>{});
    for (; begin < end; begin += e.channels) group(first, begin, Fixed<1>{});
  });
}

// f(row) for the rows of a group. Unrolled where that is wanted, and not for the ends of rows, which are few.
template <bool Unrolled, class Access, int64_t N, class F>
BN_INLINE void for_each_row(Access, Fixed<N>, F f) {
  if constexpr (Unrolled && Access::whole) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < N; ++r) f(r);
  } else {
#pragma GCC unroll 1
    for (int64_t r = 0; r < N; ++r) f(r);
  }
}

}  // namespace
}  // namespace batchnorm
