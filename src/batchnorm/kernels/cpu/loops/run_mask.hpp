// The mask's values for a run or for rows, step by step.
#pragma once

#include <cstdint>
#include <cstring>

#include "loops/kernels.hpp"
#include "loops/simd.hpp"
#include "loops/steps.hpp"
#include "loops/sums.hpp"

namespace batchnorm {
namespace {

template <class T>
BN_INLINE Choice<Vector<T>> load_choice(Whole<T>, const uint8_t* p) {
  return nonzero<Vector<T>>(p);
}

template <class T>
BN_INLINE Choice<Vector<T>> load_choice(Part<T> part, const uint8_t* p) {
  uint8_t values[kLanes<Vector<T>>] = {};
  std::memcpy(values, p, part.n);
  return nonzero<Vector<T>>(values);
}

// The mask of a run's or a row's values.
struct RunMask {
  MaskType type;
  const char* values;  // where they begin
  bool constant;       // one value for all: a row is one position

  // Which values of the step at k count, by booleans.
  template <class V, class Access>
  BN_INLINE Choice<V> counted(Access access, int64_t k) const {
    const auto* p = reinterpret_cast<const uint8_t*>(values);
    return constant ? splat<Choice<V>>(*p) != 0 : load_choice(access, p + k);
  }

  // The sample weights of the step at k.
  template <class V, class Access>
  BN_INLINE void load(Access access, int64_t k, Doubles (&wide)[Sum<V>::parts]) const {
    const auto from = [&](const auto* p) {
      if (constant)
        for (auto& part : wide) part = splat<Doubles>(*p);
      else
        load_doubles(access, p + k, wide);
    };
    if (type == MaskType::float32)
      from(reinterpret_cast<const float*>(values));
    else
      from(reinterpret_cast<const double*>(values));
  }

  // v times the mask of the step at k; 0 where the mask is 0, whatever v is. Called, not inlined, at the ends of runs.
  template <class V, class Access>
  BN_INLINE V times(Access access, int64_t k, V v) const {
    if constexpr (Access::whole)
      return product(access, k, v);
    else
      return called_product(access, k, v);
  }

 private:
  template <class V, class Access>
  __attribute__((noinline)) V called_product(Access access, int64_t k, V v) const {
    return product(access, k, v);
  }

  template <class V, class Access>
  BN_INLINE V product(Access access, int64_t k, V v) const {
    if (type == MaskType::boolean) return counted<V>(access, k) ? v : V{};
    Doubles wide[Sum<V>::parts];
    load<V>(access, k, wide);
    const V sample_weight = narrowed(wide);
    return sample_weight != 0 ? sample_weight * v : V{};
  }
};

// Room for the mask of a group of packed rows, with an entry for each value: small enough for the first cache.
class MaskBuffer {
 public:
  // Each of n mask values, `channels` times.
  const char* fill(MaskType type, const char* from, int64_t n, int64_t channels) {
    if (type == MaskType::boolean) fill(reinterpret_cast<const uint8_t*>(from), n, channels);
    if (type == MaskType::float32) fill(reinterpret_cast<const float*>(from), n, channels);
    if (type == MaskType::float64) fill(reinterpret_cast<const double*>(from), n, channels);
    return bytes_;
  }

 private:
  static constexpr int64_t kChunk = 16;  // bytes that are written at a time

  // Writes whole chunks: what the last chunk of a value has too much, the next value overwrites.
  template <class W>
  __attribute__((noinline)) void fill(const W* from, int64_t n, int64_t channels) {
    typedef W Chunk __attribute__((vector_size(kChunk)));
    W* to = reinterpret_cast<W*>(bytes_);
    if (channels <= kLanes<Chunk>) {  // the usual case has no loop in the loop
      for (int64_t i = 0; i < n; ++i, to += channels) store_raw(to, splat<Chunk>(from[i]));
      return;
    }
    for (int64_t i = 0; i < n; ++i, to += channels)
      for (int64_t c = 0; c < channels; c += kLanes<Chunk>) store_raw(to + c, splat<Chunk>(from[i]));
  }

  alignas(kBytes) char bytes_[kMaxPackedRow * sizeof(double) + kChunk];
};

// Whether each row holds several positions.
BN_INLINE bool packed(const Extents& e, const Mask& mask) { return mask && e.channels > mask.channels; }

// The mask of the run at `at`, or of so many rows from there on.
BN_INLINE RunMask run_mask(const Extents& e, const Mask& mask, int64_t at, int64_t rows, MaskBuffer& buffer) {
  if (!mask) return {MaskType::none, nullptr, false};
  const auto* values = static_cast<const char*>(mask.values);
  const int64_t size = size_of(mask.type);
  if (!e.rows()) return {mask.type, values + (at / (e.channels * e.inner) * e.inner + at % e.inner) * size, false};
  values += at / mask.channels * size;
  if (!packed(e, mask)) return {mask.type, values, true};
  return {mask.type, buffer.fill(mask.type, values, rows * e.channels / mask.channels, mask.channels), false};
}

// The mask of a later row of the group that `first` begins.
BN_INLINE RunMask row_mask(const RunMask& first, const Extents& e, int64_t row) {
  return {first.type, first.values + row * (first.constant ? 1 : e.channels) * size_of(first.type), first.constant};
}

}  // namespace
}  // namespace batchnorm
