// How the work is split: by the shape alone, so that no result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.hpp"

namespace batchnorm {
namespace {

constexpr int64_t kPart = 1 << 16;          // values of a part, at least
constexpr int64_t kMaxParts = 32;           // each has sums of its own for every channel
constexpr int64_t kGrain = 1 << 15;         // values that are worth a thread
constexpr int64_t kAlign = 64;              // parts of planes begin at multiples of this many values
constexpr int64_t kFewChannels = 256;       // rows of fewer are joined to wider ones where that fills whole vectors
static_assert(16 * kFewChannels <= kWidestJoined);
constexpr int64_t kBlocked = 1 << 25;       // bytes: smaller inputs stay in a last-level cache between two sweeps
constexpr int64_t kBlock = 1 << 20;         // bytes of a block, a share of the last-level cache for each core
constexpr int64_t kLargestBlock = 1 << 21;  // bytes that one channel may need
constexpr int64_t kFewestBlocks = 16;       // with fewer, threads would wait for each other

// Has what was streamed past the caches be in memory before a thread says that it is done. Once for a thread: it waits.
void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How an input is gone through, in one of two orders.
//
// As parts of adjacent values: first all parts for the sums, then all again for the output. Every value is read from
// memory twice where the cache does not hold them all.
//
// As blocks of channels, where an input of planes is larger than a last-level cache: each block is gone through twice
// in turn, the second time in the cache.
//
// A sum over a channel is the sum over the parts, in order, whoever adds them up: so it depends neither on the number
// of threads nor on the order.
//
// Rows of few channels are taken `repeat` at a time, as one row with every channel `repeat` times: the kernels then
// fill whole vectors. What is left over, less than `repeat` rows, belongs to the last part.
class Schedule {
 public:
  Schedule(const Walk& w, int64_t element_size)
      : walk_(w), rest_(w), repeat_(1), start_(0), length_(0), parts_(0), width_(0) {
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
    const int64_t channel = w.count() * element_size;
    const bool wide = element_size >= 4;  // half precision was measured to be slower this way; why is not known
    if (wide && !w.rows() && w.size() * element_size > kBlocked && channel <= kLargestBlock) {
      width_ = std::clamp<int64_t>(kBlock / channel, 1, w.channels);
      if (w.channels / width_ < kFewestBlocks) width_ = 0;
    }
  }

  int64_t repeat() const { return repeat_; }

  // Whether the input can be gone through block by block.
  bool blocks() const { return width_ > 0; }

  // then(walk, begin, end) for every part and for the rest.
  template <class Then>
  void each(const Then& then) const {
    each_part(false, [&](int64_t, const Walk& w, int64_t begin, int64_t end) { then(w, begin, end); });
  }

  // Two sums for each channel: `add(walk, begin, end, sums)` adds a range's, `finish(channel, first, second)` receives
  // the totals. Nothing is called for an empty input.
  template <class Add, class Finish>
  void reduce(const Add& add, const Finish& finish) const {
    if (parts_ == 0) return;
    double* sums = scratch();
    each_part(false, [&](int64_t part, const Walk& w, int64_t begin, int64_t end) {
      if (&w == &walk_) clear(own(sums, part, 0), walk_.channels);
      add(w, begin, end, own(sums, part, 0));
    });
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 2 * repeat_ * parts_));
    torch::stable::parallel_for(
        0, rest_.channels, grain, [&](int64_t begin, int64_t end) { total(sums, begin, end, finish); });
  }

  // `reduce`, and then `then(walk, begin, end)` for every range, which may use what `finish` left.
  template <class Add, class Finish, class Then>
  void reduce_then(bool by_blocks, const Add& add, const Finish& finish, const Then& then) const {
    if (!by_blocks) {
      reduce(add, finish);
      // In reverse, which finds in the cache what the pass before left there.
      each_part(true, [&](int64_t, const Walk& w, int64_t begin, int64_t end) { then(w, begin, end); });
      return;
    }
    double* sums = scratch();
    const int64_t blocks = ceil_div(walk_.channels, width_);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t first = block * width_, last = std::min(walk_.channels, first + width_);
        for (int64_t part = 0; part < parts_; ++part) clear(own(sums, part, first), last - first);
        for (int64_t o = 0; o < walk_.outer; ++o)
          for (int64_t begin = (o * walk_.channels + first) * walk_.inner,
                       stop = (o * walk_.channels + last) * walk_.inner;
               begin < stop;) {
            const int64_t part = begin / length_, end = std::min(stop, (part + 1) * length_);
            add(walk_, begin, end, own(sums, part, 0));
            begin = end;
          }
        total(sums, first, last, finish);
        for (int64_t o = walk_.outer - 1; o >= 0; --o)
          then(walk_, (o * walk_.channels + first) * walk_.inner, (o * walk_.channels + last) * walk_.inner);
      }
      stream_fence();
    });
  }

 private:
  // f(part, walk, begin, end) for every part, and again for the rest in the last: on all threads, each thread's parts
  // in order or in reverse.
  template <class F>
  void each_part(bool reverse, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length_));
    torch::stable::parallel_for(0, parts_, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = reverse ? first + last - 1 - i : i;
        f(part, walk_, part * length_, std::min(start_, (part + 1) * length_));
        if (part == parts_ - 1 && rest_.outer > 0) f(part, rest_, start_, start_ + rest_.size());
      }
      stream_fence();
    });
  }

  // Room for every part's sums. Kept for the next call: up to a megabyte that would otherwise be mapped and unmapped
  // every time.
  double* scratch() const {
    static thread_local std::vector<double> sums;
    if (const size_t size = 2 * walk_.channels * parts_; sums.size() < size) sums.resize(size);
    return sums.data();
  }

  // A part's sums, from a channel on.
  Sums own(double* sums, int64_t part, int64_t channel) const {
    double* first = sums + part * 2 * walk_.channels + channel;
    return {first, first + walk_.channels};
  }

  static void clear(Sums sums, int64_t channels) {
    std::fill_n(sums.first, channels, 0.0);
    std::fill_n(sums.second, channels, 0.0);
  }

  template <class Finish>
  void total(double* sums, int64_t begin, int64_t end, const Finish& finish) const {
    for (int64_t c = begin; c < end; ++c) {
      double first = 0, second = 0;
      for (int64_t part = 0; part < parts_; ++part) {
        const Sums its = own(sums, part, 0);
        for (int64_t i = c; i < walk_.channels; i += rest_.channels) first += its.first[i], second += its.second[i];
      }
      finish(c, first, second);
    }
  }

  Walk walk_, rest_;
  int64_t repeat_, start_, length_, parts_;
  int64_t width_;  // channels of a block; 0 where there are none
};

}  // namespace
}  // namespace batchnorm
