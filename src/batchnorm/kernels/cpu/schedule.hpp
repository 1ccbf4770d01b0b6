// How the work is split: by the shape alone, so that no result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace batchnorm {
namespace {

constexpr int64_t kPart = 1 << 16;         // values of a part: 256 KiB of float32
constexpr int64_t kMaxParts = 64;          // of a matrix of rows: each has sums of its own for every channel
constexpr int64_t kGrain = 1 << 15;        // values that are worth a thread
constexpr int64_t kChannelsPerThread = 8;  // from here on, whole channels divide well enough over threads

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of each channel's sequence of values (planes), or of the rows of all channels together. A sum over a channel
// is the sum over its parts, in order, so it does not depend on how many threads share them.
struct Parts {
  bool rows;
  int64_t length, count, total;

  explicit Parts(const Walk& w) : rows(w.inner == 1), total(w.count()) {
    const int64_t wanted = rows ? std::min(kMaxParts, ceil_div(total * w.channels, kPart)) : ceil_div(total, kPart);
    length = std::max<int64_t>(1, ceil_div(total, std::max<int64_t>(1, wanted)));
    count = ceil_div(total, length);
  }

  int64_t begin(int64_t part) const { return part * length; }
  int64_t end(int64_t part) const { return std::min(total, (part + 1) * length); }
};

template <class F>
void parallel(int64_t tasks, int64_t values_per_task, const F& task) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values_per_task));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Two sums for each channel. `plane(channel, begin, end, sums of that channel)` and `rows(begin, end, sums of all)`
// add a range's; `finish(channel, first, second)` receives the totals; `use(channel, begin, end)` and
// `use_rows(begin, end)`, where given, then work on the same values.
//
// Planes are finished and used channel by channel, while the channel is still in the cache, when whole channels keep
// all threads busy. Otherwise, and for rows, all sums come first.
template <class Plane, class Rows, class Finish, class Use, class UseRows>
void reduce_then(const Walk& w, const Plane& plane, const Rows& rows, const Finish& finish, const Use& use,
                 const UseRows& use_rows) {
  const Parts parts(w);
  if (parts.rows) {
    std::vector<double> sums(parts.count * 2 * w.channels);
    parallel(parts.count, parts.length * w.channels,
             [&](int64_t p) { rows(parts.begin(p), parts.end(p), sums.data() + p * 2 * w.channels); });
    for (int64_t p = 1; p < parts.count; ++p)
      for (int64_t i = 0; i < 2 * w.channels; ++i) sums[i] += sums[p * 2 * w.channels + i];
    for (int64_t c = 0; c < w.channels; ++c) finish(c, sums[c], sums[w.channels + c]);
    parallel(parts.count, parts.length * w.channels, [&](int64_t p) { use_rows(parts.begin(p), parts.end(p)); });
    return;
  }
  const auto finish_channel = [&](int64_t c, const double* sums) {
    double first = 0, second = 0;
    for (int64_t p = 0; p < parts.count; ++p) first += sums[2 * p], second += sums[2 * p + 1];
    finish(c, first, second);
  };
  if (w.channels >= kChannelsPerThread * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel(w.channels, w.count(), [&](int64_t c) {
      std::vector<double> sums(2 * parts.count);
      for (int64_t p = 0; p < parts.count; ++p) plane(c, parts.begin(p), parts.end(p), &sums[2 * p]);
      finish_channel(c, sums.data());
      use(c, 0, w.count());
    });
    return;
  }
  std::vector<double> sums(w.channels * parts.count * 2);
  const auto each_part = [&](const auto& task) {
    parallel(w.channels * parts.count, parts.length, [&](int64_t i) {
      const int64_t p = i % parts.count;
      task(i, i / parts.count, parts.begin(p), parts.end(p));
    });
  };
  each_part([&](int64_t i, int64_t c, int64_t begin, int64_t end) { plane(c, begin, end, &sums[2 * i]); });
  for (int64_t c = 0; c < w.channels; ++c) finish_channel(c, &sums[2 * c * parts.count]);
  each_part([&](int64_t, int64_t c, int64_t begin, int64_t end) { use(c, begin, end); });
}

constexpr auto no_use = [](int64_t, int64_t, int64_t) {};
constexpr auto no_use_rows = [](int64_t, int64_t) {};

// Work without sums before it.
template <class Use, class UseRows>
void for_each_part(const Walk& w, const Use& use, const UseRows& use_rows) {
  const Parts parts(w);
  if (parts.rows)
    parallel(parts.count, parts.length * w.channels, [&](int64_t p) { use_rows(parts.begin(p), parts.end(p)); });
  else
    parallel(w.channels * parts.count, parts.length, [&](int64_t i) {
      const int64_t p = i % parts.count;
      use(i / parts.count, parts.begin(p), parts.end(p));
    });
}

}  // namespace
}  // namespace batchnorm
