// Short samples of several domains: those of a domain are brought together, block by block.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "host/domains.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the passes go through. Outputs that may lie in an input's buffer have its name.
enum SampleBuffer { kX, kDy, kResidual, kDresidual, kMask, kBuffers };

// `kept`: read by the pass before, too, into the same buffer.
enum class Use { read, kept, written };

// An input or output of a pass: where it lies, which may be nowhere, and how many bytes of it belong to a sample.
struct SampleArray {
  const void* data = nullptr;
  int64_t bytes = 0;
  SampleBuffer buffer = kX;
  Use use = Use::read;

  void* target() const { return const_cast<void*>(data); }

  SampleArray moved(int64_t by) const {
    SampleArray a = *this;
    if (data) a.data = static_cast<const char*>(data) + by;
    return a;
  }
};

// Goes through ranges of samples block by block. The loops want many values of one domain side by side, in whole
// vectors: a block's samples are copied into a buffer, sorted by domain, gone through there, and what was written is
// copied back. What is small stays in the buffers from one pass to the next. In a block of few changes of domain,
// samples are gone through where they lie.
//
// In which order a domain's samples are added up depends on the shape and the domains alone.
class Gathering {
 public:
  Gathering() = default;

  // Rows are packed by `repeat`, parts have so many samples. The domains stay where they are.
  Gathering(const Extents& e, int64_t element_size, const Domains& domains, int64_t repeat, int64_t part)
      : extents_(e),
        of_sample_(domains.bytes()),
        domains_(domains.number),
        repeat_(repeat),
        samples_(domains.samples()),
        long_(e.sample > kLongest) {
    const int64_t bytes = e.sample * element_size;
    kept_ = !long_ && samples_ * bytes <= kKeptBytes;
    // A domain has several groups of rows in a block.
    const int64_t block_bytes = std::max(kBlockBytes, 4 * kRows * domains_ * bytes);
    block_ = kept_ ? std::min(part, kMostSamples) : std::clamp<int64_t>(block_bytes / bytes, 1, kMostSamples);
    part_ = part, room_ = block_ + kChunk;
    of_part_ = ceil_div(part_, block_);
    const int64_t blocks = ceil_div(samples_, part_) * of_part_;
    Workspace& workspace = own();
    places_ = at_least(workspace.places, samples_).data();
    orders_ = at_least(workspace.orders, blocks * room_).data();
    starts_ = at_least(workspace.starts, blocks * (domains_ + 1)).data();
    // A step has several passes over samples of the same domains, a network many layers.
    const std::array<int64_t, 4> sizes = {samples_, domains_, part_, block_};
    std::vector<uint8_t>& sorted = workspace.sorted;
    if (workspace.sizes == sizes && std::memcmp(sorted.data(), of_sample_, samples_) == 0) return;
    workspace.sizes = {};
    torch::stable::parallel_for(0, blocks, ceil_div(kGrainSamples, block_), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) sort(block);
    });
    sorted.assign(of_sample_, of_sample_ + samples_);
    workspace.sizes = sizes;
  }

  // Whether samples are so short that it pays, and domains so few that a block has several samples of each. In half
  // precision, where sums are float32 for as many rows as are taken together, samples of fewer rows are short, too, if
  // their rows are not `packed`.
  static bool pays(const Extents& e, int64_t element_size, int64_t domains, bool packed) {
    if (e.domains == nullptr || domains < 2 || domains > Domains::kFewDomains) return false;
    const bool few_rows = element_size < 4 && e.rows() && !packed && e.sample < kRows * e.channels;
    return e.sample <= kLongest || (few_rows && e.sample * element_size <= kLongestRows);
  }

  explicit operator bool() const { return block_ > 0; }

  // Whether outputs, of which a sample's values have nothing to do with another's, are gone through like this, too.
  bool of_outputs() const { return block_ > 0 && !long_; }

  // Makes room for what will be kept. Before the passes: threads share it.
  template <size_t N>
  void reserve(const std::array<SampleArray, N>& arrays) const {
    if (!kept_) return;
    const int64_t room = ceil_div(samples_, part_) * of_part_ * room_;
    for (const SampleArray& a : arrays)
      if (a.data) kept_memory_[a.buffer] = at_least(own().kept[a.buffer], room * a.bytes).data();
  }

  // run(extents, where the domain's row of the tables begins, arrays that begin there) for all samples of the range,
  // which is a part, those of a domain together.
  template <size_t N, class Run>
  void each(int64_t begin, int64_t end, const std::array<SampleArray, N>& arrays, const Run& run) const {
    const int64_t first = begin / extents_.sample, last = end / extents_.sample;
    for (int64_t i = first, block = first / part_ * of_part_; i < last; i += block_, ++block) {
      const int64_t n = std::min(block_, last - i);
      std::array<SampleArray, N> here;
      for (size_t k = 0; k < N; ++k) here[k] = arrays[k].moved(i * arrays[k].bytes);
      if (starts_[block * (domains_ + 1)] < 0)
        runs(of_sample_ + i, n, here, run);
      else
        sorted(block, i, n, here, run);
    }
  }

 private:
  static constexpr int64_t kKeptBytes = 1 << 21;   // of an array: what stays in the caches next to a core
  static constexpr int64_t kBlockBytes = 1 << 16;  // of an array, where it does not
  static constexpr int64_t kLongest = 32;          // values: longer samples fill vectors by themselves
  static constexpr int64_t kRows = 8;               // that the loops take together
  static constexpr int64_t kLongestRows = 1 << 13;  // bytes
  static constexpr int64_t kMostSamples = (1 << 15) - 1;  // whose counts fit into a quarter of a word
  static constexpr int64_t kLongRun = 1 << 11;            // values of one domain that need no others
  static constexpr int64_t kGrainSamples = 1 << 14;
  static constexpr int64_t kChunk = 16;  // bytes that are copied at a time

  // What a thread keeps for its next call: it would otherwise be mapped and unmapped every time.
  struct Workspace {
    std::vector<int32_t> places, orders, starts;
    std::vector<uint8_t> sorted;  // the domains that they are of, and what else decides
    std::array<int64_t, 4> sizes{};
    std::array<std::vector<char>, kBuffers> kept, block;
  };

  static Workspace& own() {
    static thread_local Workspace workspace;
    return workspace;
  }

  template <class T>
  static std::vector<T>& at_least(std::vector<T>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory;
  }

  // Where the samples of a block go, which come there, and where each domain's begin; -1 where all stay as they are.
  void sort(int64_t block) const {
    const int64_t first = block / of_part_ * part_ + block % of_part_ * block_;
    const int64_t n = std::min({block_, samples_ - first, block / of_part_ * part_ + part_ - first});
    int32_t* start = starts_ + block * (domains_ + 1);
    if (n <= 0) return;
    const uint8_t* domain = of_sample_ + first;
    int32_t* place = places_ + first;
    const int64_t changes = changes_in(domain, n);
    if ((changes + 1) * kLongRun <= n * extents_.sample || changes == 0) {
      *start = -1;
      return;
    }
    if (domains_ <= 4)
      sort_few(domain, n, place, start);
    else
      sort_many(domain, n, place, start);
    int32_t* order = orders_ + block * room_;
    for (int64_t i = 0; i < n; ++i) order[place[i]] = static_cast<int32_t>(i);
  }

  // Counted in bytes as long as that fits, which the compiler does by whole vectors.
  static int64_t changes_in(const uint8_t* domain, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 1; i < n;) {
      const int64_t end = std::min<int64_t>(n, i + 240);
      uint8_t changes = 0;
      for (; i < end; ++i) changes += domain[i] != domain[i - 1];
      sum += changes;
    }
    return sum;
  }

  // Counters in one word: in memory each addition would wait for the one before it.
  void sort_few(const uint8_t* domain, int64_t n, int32_t* place, int32_t* start) const {
    uint64_t counts = 0;
    for (int64_t i = 0; i < n; ++i) counts += uint64_t{1} << 16 * domain[i];
    uint64_t next = 0;
    for (int64_t d = 0, at = 0; d <= domains_; ++d) {
      start[d] = static_cast<int32_t>(at);
      if (d < domains_) at += static_cast<int64_t>(counts >> 16 * d & 0xFFFF);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t shift = 16 * domain[i];
      place[i] = start[domain[i]] + static_cast<int32_t>(next >> shift & 0xFFFF);
      next += uint64_t{1} << shift;
    }
  }

  void sort_many(const uint8_t* domain, int64_t n, int32_t* place, int32_t* start) const {
    std::array<int32_t, Domains::kFewDomains + 1> counts{};
    for (int64_t i = 0; i < n; ++i) place[i] = counts[domain[i]]++;
    for (int64_t d = 0, at = 0; d <= domains_; ++d) {
      start[d] = static_cast<int32_t>(at);
      at += counts[d];
    }
    for (int64_t i = 0; i < n; ++i) place[i] += start[domain[i]];
  }

  // n samples of one domain that lie side by side.
  template <size_t N, class Run>
  void segment(int64_t n, int64_t domain, const std::array<SampleArray, N>& arrays, const Run& run) const {
    const int64_t channels = extents_.channels, row = domain * channels * repeat_;
    if (channels == 1) return run(Extents{1, 1, n * extents_.sample}, row, arrays);  // one plane
    if (!extents_.rows()) return run(Extents{n, channels, extents_.inner}, row, arrays);
    const int64_t of_sample = extents_.sample / channels, rows = n * of_sample, whole = rows / repeat_;
    if (whole > 0) run(Extents{whole, channels * repeat_, 1}, row, arrays);
    const int64_t rest = rows - whole * repeat_;  // fewer than are packed: one shorter row
    if (rest == 0) return;
    std::array<SampleArray, N> of_rest;
    for (size_t k = 0; k < N; ++k) of_rest[k] = arrays[k].moved(whole * repeat_ * (arrays[k].bytes / of_sample));
    run(Extents{1, channels * rest, 1}, row, of_rest);
  }

  // Many samples at a time.
  static int64_t end_of_run(const uint8_t* domain, int64_t first, int64_t n) {
    constexpr int64_t many = 64;
    int64_t i = first + 1;
    for (uint8_t different = 0; i + many <= n; i += many) {
      for (int64_t k = i; k < i + many; ++k) different |= domain[k] ^ domain[first];
      if (different) break;
    }
    while (i < n && domain[i] == domain[first]) ++i;
    return i;
  }

  template <size_t N, class Run>
  void runs(const uint8_t* domain, int64_t n, const std::array<SampleArray, N>& arrays, const Run& run) const {
    for (int64_t first = 0, last; first < n; first = last) {
      last = end_of_run(domain, first, n);
      std::array<SampleArray, N> here;
      for (size_t k = 0; k < N; ++k) here[k] = arrays[k].moved(first * arrays[k].bytes);
      segment(last - first, domain[first], here, run);
    }
  }

  template <size_t N, class Run>
  void sorted(int64_t block, int64_t first, int64_t n, const std::array<SampleArray, N>& arrays, const Run& run) const {
    const int32_t *place = places_ + first, *order = orders_ + block * room_, *start = starts_ + block * (domains_ + 1);
    std::array<SampleArray, N> buffers = arrays;
    for (size_t k = 0; k < N; ++k) {
      const SampleArray& a = arrays[k];
      if (!a.data) continue;
      char* memory = kept_ ? kept_memory_[a.buffer] + block * room_ * a.bytes
                           : at_least(own().block[a.buffer], room_ * a.bytes).data();
      buffers[k].data = memory;
      if (a.use == Use::written || (a.use == Use::kept && kept_)) continue;
      for (int64_t d = 0; d < domains_; ++d)
        copy(static_cast<const char*>(a.data), memory + start[d] * a.bytes, order + start[d],
             start[d + 1] - start[d], a.bytes);
    }
    for (int64_t d = 0; d < domains_; ++d) {
      const int64_t samples = start[d + 1] - start[d];
      if (samples == 0) continue;
      std::array<SampleArray, N> of_domain;
      for (size_t k = 0; k < N; ++k) of_domain[k] = buffers[k].moved(start[d] * buffers[k].bytes);
      segment(samples, d, of_domain, run);
    }
    for (size_t k = 0; k < N; ++k)
      if (const SampleArray& a = arrays[k]; a.data && a.use == Use::written)
        copy(static_cast<const char*>(buffers[k].data), static_cast<char*>(a.target()), place, n, a.bytes);
  }

  // Brings together the n samples that lie at `places`.
  static void copy(const char* from, char* to, const int32_t* places, int64_t n, int64_t bytes) {
    const auto by_chunks = [&]<int64_t Chunks>() {
      // What the last chunk of a sample has too much, later samples overwrite. So the last samples are copied exactly.
      const int64_t whole = bytes % kChunk == 0 ? n : std::max<int64_t>(0, n - kChunk);
      copy_as<Chunks * kChunk>(from, to, places, 0, whole, bytes);
      copy_exactly(from, to, places, whole, n, bytes);
    };
    if (bytes == 1) return copy_as<1>(from, to, places, 0, n, 1);
    if (bytes == 2) return copy_as<2>(from, to, places, 0, n, 2);
    if (bytes == 4) return copy_as<4>(from, to, places, 0, n, 4);
    if (bytes == 8) return copy_as<8>(from, to, places, 0, n, 8);
    const int64_t chunks = ceil_div(bytes, kChunk);
    if (chunks == 1) return by_chunks.template operator()<1>();
    if (chunks == 2) return by_chunks.template operator()<2>();
    if (chunks == 3) return by_chunks.template operator()<3>();
    if (chunks == 4) return by_chunks.template operator()<4>();
    copy_exactly(from, to, places, 0, n, bytes);
  }

  // Samples of `bytes` bytes, of each the first Bytes.
  template <int64_t Bytes>
  static void copy_as(const char* from, char* to, const int32_t* places, int64_t begin, int64_t end, int64_t bytes) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + places[i] * bytes, Bytes);
  }

  static void copy_exactly(const char* from, char* to, const int32_t* places, int64_t begin, int64_t end,
                           int64_t bytes) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + places[i] * bytes, bytes);
  }

  Extents extents_{0, 0, 0};
  const uint8_t* of_sample_ = nullptr;
  int64_t domains_ = 0, repeat_ = 1, samples_ = 0;
  bool long_ = false;  // whether only sums want samples together
  bool kept_ = false;  // whether all blocks have buffers of their own
  int64_t part_ = 0, block_ = 0, of_part_ = 0;  // samples of a part, of a block; blocks of a part
  int64_t room_ = 0;  // samples in a block's buffer: what is read there in chunks may reach beyond the last one
  int32_t *places_ = nullptr, *orders_ = nullptr, *starts_ = nullptr;
  mutable std::array<char*, kBuffers> kept_memory_{};
};

}  // namespace
}  // namespace batchnorm
