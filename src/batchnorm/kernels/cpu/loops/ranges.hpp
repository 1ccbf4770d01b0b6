// Ranges, gone through by runs, by groups of rows, or by parts of one domain each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

// The runs of planes in the range: run(channel, offset of the first value, length).
template <class Run>
BN_INLINE void for_each_run(const Extents& e, int64_t begin, int64_t end, Run run) {
  int64_t channel = begin / e.inner % e.channels, within = begin % e.inner;
  while (begin < end) {
    const int64_t length = e.inner - within < end - begin ? e.inner - within : end - begin;
    run(channel, begin, length);
    begin += length, within = 0;
    if (++channel == e.channels) channel = 0;
  }
}

template <int64_t N>
using Fixed = std::integral_constant<int64_t, N>;

// How many rows, or vectors of a run, are taken together: the sums of a channel are read and written once for the whole
// group, and a gradient's few terms are added up in their own type before they go into the float64 sum. (Moments of
// float32 are not: their differences from a pivot that may be an outlier must not round.)
constexpr int64_t kGroup = 8;

// group(offset of the first row, Fixed<how many rows>) for the range.
template <class Group>
BN_INLINE void for_each_group(const Extents& e, int64_t begin, int64_t end, bool single, Group group) {
  for (; !single && begin + kGroup * e.channels <= end; begin += kGroup * e.channels) group(begin, Fixed<kGroup>{});
  for (; begin < end; begin += e.channels) group(begin, Fixed<1>{});
}

// How far ahead of a value the memory is that is asked for with it: the next group, or nothing that is not there already.
// Columns of a few rows that lie together in a page or two are an order that a machine's prefetcher does not see
// through; of longer rows it sees each by itself.
template <class T>
BN_INLINE int64_t ahead_by(const Extents& e) {
  constexpr int64_t short_group = 1 << 13;  // bytes
  const int64_t values = kGroup * e.channels;
  return values * static_cast<int64_t>(sizeof(T)) <= short_group ? values : 0;
}

template <class T>
BN_INLINE void prefetch(const void* p, int64_t i) {
  __builtin_prefetch(static_cast<const T*>(p) + i);
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

// --- domains ---------------------------------------------------------------------------------------------------------

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

}  // namespace
}  // namespace batchnorm
