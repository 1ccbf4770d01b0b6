// How the work is split: by the shape alone, so that no result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.hpp"

namespace batchnorm {
namespace {

constexpr int64_t kPart = 1 << 16;      // values of a part, at least
constexpr int64_t kMaxParts = 32;       // each has sums of its own for every channel
constexpr int64_t kGrain = 1 << 15;     // values that are worth a thread
constexpr int64_t kAlign = 64;          // parts of planes begin at multiples of this many values
constexpr int64_t kFewChannels = 256;   // rows of fewer are joined to wider ones where that fills whole vectors

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An input as parts of adjacent values. A sum over a channel is the sum over the parts, in order, so it does not
// depend on how many threads share them.
//
// Rows of few channels are taken `repeat` at a time, as one row with every channel `repeat` times: the kernels then
// fill whole vectors. What is left over, less than `repeat` rows, belongs to the last part.
class Schedule {
 public:
  explicit Schedule(const Walk& w) : walk_(w), rest_(w), repeat_(1), start_(0), length_(0), parts_(0) {
    if (w.size() == 0) return;
    if (w.rows() && w.channels < kFewChannels && w.channels % 16 != 0) {
      repeat_ = 16 / std::gcd<int64_t>(w.channels, 16);
      while (repeat_ * w.channels < 64) repeat_ *= 2;
      if (w.outer < 2 * repeat_) repeat_ = 1;
    }
    walk_.outer = w.outer / repeat_;
    walk_.channels = w.channels * repeat_;
    start_ = walk_.size();
    rest_.outer = repeat_ == 1 ? 0 : w.outer % repeat_;
    const int64_t wanted = std::clamp<int64_t>(start_ / kPart, 1, kMaxParts);
    const int64_t unit = w.rows() ? walk_.channels : kAlign;
    length_ = ceil_div(ceil_div(start_, unit), wanted) * unit;
    parts_ = ceil_div(start_, length_);
  }

  int64_t repeat() const { return repeat_; }

  // f(part, walk, begin, end) for every part, and again for the rest in the last: on all threads, each thread's parts
  // in order, or in reverse, which finds in the cache what the pass before left there.
  template <class F>
  void each_part(bool reverse, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length_));
    torch::stable::parallel_for(0, parts_, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = reverse ? first + last - 1 - i : i;
        f(part, walk_, part * length_, std::min(start_, (part + 1) * length_));
        if (part == parts_ - 1 && rest_.outer > 0) f(part, rest_, start_, start_ + rest_.size());
      }
    });
  }

  // Two sums for each channel: `add(walk, begin, end, sums)` adds a range's, `finish(channel, first, second)` receives
  // the totals.
  template <class Add, class Finish>
  void reduce(const Add& add, const Finish& finish) const {
    const int64_t channels = rest_.channels, width = walk_.channels;
    // Kept for the next call: up to a megabyte that would otherwise be mapped and unmapped every time.
    static thread_local std::vector<double> sums;
    sums.assign(2 * width * parts_, 0);
    // By value: inside a task, `sums` would be the vector of the thread that runs it.
    const auto own = [own = sums.data(), width](int64_t part) { return own + part * 2 * width; };
    each_part(false, [&](int64_t part, const Walk& w, int64_t begin, int64_t end) {
      add(w, begin, end, Sums{own(part), own(part) + width});
    });
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 2 * repeat_ * parts_));
    torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double first = 0, second = 0;
        for (int64_t part = 0; part < parts_; ++part)
          for (int64_t i = c; i < width; i += channels) first += own(part)[i], second += own(part)[width + i];
        finish(c, first, second);
      }
    });
  }

 private:
  Walk walk_, rest_;
  int64_t repeat_, start_, length_, parts_;
};

}  // namespace
}  // namespace batchnorm
