// How the work is split: by the shape alone, so that no result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>

#include "host/domains.hpp"
#include "host/gathering.hpp"
#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

constexpr int64_t kPart = 1 << 16;          // values of a part, at least
constexpr int64_t kMaxParts = 32;           // each has sums of its own for every channel
constexpr int64_t kKept = 1 << 22;          // bytes for sums that a thread keeps for its next call
constexpr int64_t kGrain = 1 << 15;         // values that are worth a thread
constexpr int64_t kAlign = 64;              // parts of planes begin at multiples of this many values
constexpr int64_t kFewChannels = 256;       // rows of fewer are packed where that fills whole vectors
static_assert(16 * kFewChannels <= kMaxPackedRow);
constexpr int64_t kBlocked = 1 << 22;       // bytes: smaller inputs stay in the caches near the cores between two sweeps
constexpr int64_t kBlock = 1 << 19;         // bytes of a block, of which such a cache holds two
constexpr int64_t kLargestBlock = 1 << 21;  // bytes that one channel may need
constexpr int64_t kFewestBlocks = 16;       // with fewer, threads would wait for each other

// Waits until what was streamed past the caches is in memory. Once for each thread, before it reports that it is done.
void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// How an input is gone through, in one of two orders.
//
// As parts of adjacent values: first all parts for the sums, then all again for the output. Every value is read from
// memory twice where the cache does not hold them all.
//
// As blocks of channels, where an input of planes is larger than the caches near the cores: each block is gone through
// twice in turn, the second time in the cache.
//
// A sum over a channel is the sum over the parts in order, whichever thread adds them up: it depends neither on the
// number of threads nor on their timing.
//
// Rows of few channels are packed, `repeat` rows into one in which every channel comes `repeat` times: the kernels then
// fill whole vectors. What is left over, less than `repeat` rows, belongs to the last part.
//
// Short samples of several domains are packed later, when those of a domain have been brought together.
class Schedule {
 public:
  // Each domain has sums of its own.
  Schedule(const Input& input, const Domains& domains)
      : Schedule(domains.in(input), input.tensor.element_size(), domains) {}

 private:
  Schedule(const Extents& e, int64_t element_size, const Domains& domains)
      : extents_(e), rest_(e), domains_(domains.number), repeat_(1), start_(0), length_(0), parts_(0), width_(0) {
    if (e.size() == 0) return;
    const bool packs = e.rows() && e.channels < kFewChannels && e.channels % 16 != 0;
    const bool gathers = Gathering::pays(e, element_size, domains_, packs);
    if (packs) {
      repeat_ = 16 / std::gcd<int64_t>(e.channels, 16);
      while (repeat_ * e.channels < 64) repeat_ *= 2;
      // A packed row is of one sample, whose rows are all packed.
      if (e.domains && !gathers) repeat_ = divisor(e.sample / e.channels, repeat_, kMaxPackedRow / e.channels);
      if (e.outer < 2 * repeat_) repeat_ = 1;
    }
    row_ = e.channels * repeat_;
    if (!gathers) extents_.outer = e.outer / repeat_, extents_.channels = row_;
    start_ = extents_.size();
    rest_.outer = repeat_ == 1 || gathers ? 0 : e.outer % repeat_;
    // Where channels are many and their values few, the sums of many parts would be larger than the input.
    const int64_t sums = 2 * static_cast<int64_t>(sizeof(double)) * entries();
    const int64_t room = std::max(kKept, e.size() * element_size / 2) / sums;
    const int64_t wanted = std::clamp<int64_t>(start_ / kPart, 1, std::clamp<int64_t>(room, 1, kMaxParts));
    const int64_t unit = gathers ? e.sample : e.rows() ? extents_.channels : kAlign;
    length_ = ceil_div(ceil_div(start_, unit), wanted) * unit;
    parts_ = ceil_div(start_, length_);
    if (gathers) gathering_ = Gathering(e, element_size, domains, repeat_, length_ / e.sample);
    const int64_t channel = e.count() * element_size;
    const bool wide = element_size >= 4;  // half precision waits for arithmetic: no faster this way, or slower
    if (wide && !gathers && !e.rows() && e.size() * element_size > kBlocked && channel <= kLargestBlock) {
      width_ = std::clamp<int64_t>(kBlock / channel, 1, e.channels);
      if (e.channels / width_ < kFewestBlocks) width_ = 0;
    }
  }

 public:
  int64_t repeat() const { return repeat_; }

  // How ranges have to be gone through: by this, where it is one.
  const Gathering& gathering() const { return gathering_; }

  // Whether the input can be gone through block by block.
  bool blocks() const { return width_ > 0; }

  // then(extents, begin, end) for every part and for the rest.
  template <class Then>
  void each(const Then& then) const {
    each_part(false, [&](int64_t, const Extents& e, int64_t begin, int64_t end) { then(e, begin, end); });
  }

  // Two sums for each channel of each domain: `add(extents, begin, end, sums)` adds those of a range,
  // `finish(domain * channels + channel, first, second)` gets the totals, and says whether all sums are to be taken
  // again. Nothing is called for an empty input.
  template <class Add, class Finish>
  void reduce(const Add& add, const Finish& finish) const {
    if (parts_ == 0) return;
    const Scratch scratch(2 * entries() * parts_);
    double* sums = scratch.data;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 2 * repeat_ * parts_));
    std::atomic<bool> again;
    do {
      each_part(false, [&](int64_t part, const Extents& e, int64_t begin, int64_t end) {
        if (&e == &extents_) clear(sums_of(sums, part, 0), entries());
        add(e, begin, end, sums_of(sums, part, 0));
      });
      again = false;
      torch::stable::parallel_for(0, domains_ * rest_.channels, grain, [&](int64_t begin, int64_t end) {
        if (total(sums, begin, end, finish)) again = true;
      });
    } while (again);
  }

  // `reduce`, and then `then(extents, begin, end)` for every range, which may use what `finish` left.
  template <class Add, class Finish, class Then>
  void reduce_then(bool by_blocks, const Add& add, const Finish& finish, const Then& then) const {
    if (!by_blocks) {
      reduce(add, finish);
      // In reverse, which finds in the cache what the pass before left there.
      each_part(true, [&](int64_t, const Extents& e, int64_t begin, int64_t end) { then(e, begin, end); });
      return;
    }
    const Scratch scratch(2 * entries() * parts_);
    double* sums = scratch.data;
    const int64_t blocks = ceil_div(extents_.channels, width_);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t first = block * width_, last = std::min(extents_.channels, first + width_);
        do {
          for (int64_t part = 0; part < parts_; ++part)
            for (int64_t d = 0; d < domains_; ++d)
              clear(sums_of(sums, part, d * extents_.channels + first), last - first);
          for (int64_t o = 0; o < extents_.outer; ++o)
            for (int64_t begin = (o * extents_.channels + first) * extents_.inner,
                         stop = (o * extents_.channels + last) * extents_.inner;
                 begin < stop;) {
              const int64_t part = begin / length_, end = std::min(stop, (part + 1) * length_);
              add(extents_, begin, end, sums_of(sums, part, 0));
              begin = end;
            }
        } while (total_of_all(sums, first, last, finish));
        for (int64_t o = extents_.outer - 1; o >= 0; --o)
          then(extents_, (o * extents_.channels + first) * extents_.inner,
               (o * extents_.channels + last) * extents_.inner);
      }
      stream_fence();
    });
  }

 private:
  // f(part, extents, begin, end) for every part, and again for the rest in the last: on all threads, the parts of each
  // in order or in reverse.
  template <class F>
  void each_part(bool reverse, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length_));
    torch::stable::parallel_for(0, parts_, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = reverse ? first + last - 1 - i : i;
        f(part, extents_, part * length_, std::min(start_, (part + 1) * length_));
        if (part == parts_ - 1 && rest_.outer > 0) f(part, rest_, start_, start_ + rest_.size());
      }
      stream_fence();
    });
  }

  // Memory for every part's sums. A little is kept for the thread's next call: it would otherwise be mapped and unmapped
  // every time.
  struct Scratch {
    std::unique_ptr<double[]> own;
    double* data;

    explicit Scratch(int64_t size) {
      static thread_local std::unique_ptr<double[]> kept;
      static thread_local int64_t kept_size = 0;
      const bool keep = size <= kKept / static_cast<int64_t>(sizeof(double));
      if (keep && size <= kept_size) {
        data = kept.get();
        return;
      }
      own = std::make_unique_for_overwrite<double[]>(size);
      data = own.get();
      if (keep) kept = std::move(own), kept_size = size;
    }
  };

  // The greatest divisor of n up to `most`, or a smaller one that is a multiple of `wanted`.
  static int64_t divisor(int64_t n, int64_t wanted, int64_t most) {
    if (n % wanted == 0) return wanted;
    while (most > 1 && n % most != 0) --most;
    return most;
  }

  // How many sums of a kind a part has.
  int64_t entries() const { return domains_ * row_; }

  // A part's sums, from an entry on.
  Sums sums_of(double* sums, int64_t part, int64_t entry) const {
    double* first = sums + part * 2 * entries() + entry;
    return {first, first + entries()};
  }

  static void clear(Sums sums, int64_t entries) {
    std::fill_n(sums.first, entries, 0.0);
    std::fill_n(sums.second, entries, 0.0);
  }

  // `total` of these channels in every domain.
  template <class Finish>
  bool total_of_all(double* sums, int64_t first, int64_t last, const Finish& finish) const {
    bool again = false;
    for (int64_t d = 0; d < domains_; ++d)
      again |= total(sums, d * rest_.channels + first, d * rest_.channels + last, finish);
    return again;
  }

  template <class Finish>
  bool total(double* sums, int64_t begin, int64_t end, const Finish& finish) const {
    bool again = false;
    for (int64_t c = begin; c < end; ++c) {
      double first = 0, second = 0;
      const int64_t domain = domains_ == 1 ? 0 : c / rest_.channels;
      const int64_t from = c + domain * (row_ - rest_.channels), end = (domain + 1) * row_;
      for (int64_t part = 0; part < parts_; ++part) {
        const Sums of_part = sums_of(sums, part, 0);
        for (int64_t i = from; i < end; i += rest_.channels) first += of_part.first[i], second += of_part.second[i];
      }
      again |= finish(c, first, second);
    }
    return again;
  }

  Extents extents_, rest_;
  Gathering gathering_;
  int64_t domains_, repeat_, start_, length_, parts_;
  int64_t row_ = 0;  // entries of a row of the tables
  int64_t width_;  // channels of a block; 0 where there are none
};

}  // namespace
}  // namespace batchnorm
