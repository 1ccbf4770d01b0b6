// What the values of a run or of a row weigh, step by step.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "simd.hpp"
#include "steps.hpp"

namespace {

using namespace batchnorm;

BN_INLINE int64_t size_of(WeightType type) {
  return type == WeightType::float64 ? 8 : type == WeightType::float32 ? 4 : 1;
}

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

// The weights of a run's or a row's values.
struct RunWeights {
  WeightType type;
  const char* values;  // where they begin
  bool same;           // one weight for all: a row's

  // Which values of the step at k count, by booleans.
  template <class V, class Which>
  BN_INLINE Choice<V> counted(Which which, int64_t k) const {
    const auto* p = reinterpret_cast<const uint8_t*>(values);
    return same ? splat<Choice<V>>(*p) != 0 : load_choice(which, p + k);
  }

  // The weights of the step at k, of numbers.
  template <class V, class Which>
  BN_INLINE void load(Which which, int64_t k, Doubles (&wide)[Sum<V>::parts]) const {
    const auto from = [&](const auto* p) {
      if (same)
        for (auto& w : wide) w = splat<Doubles>(*p);
      else
        load_doubles(which, p + k, wide);
    };
    if (type == WeightType::float32)
      from(reinterpret_cast<const float*>(values));
    else
      from(reinterpret_cast<const double*>(values));
  }

  // v times the weights of the step at k; 0 where they are 0, whatever v is.
  template <class V, class Which>
  BN_INLINE V times(Which which, int64_t k, V v) const {
    if (type == WeightType::boolean) return counted<V>(which, k) ? v : V{};
    Doubles wide[Sum<V>::parts];
    load<V>(which, k, wide);
    const V weight = narrowed(wide);
    return weight != 0 ? weight * v : V{};
  }
};

// Room for the weights of a group of joined rows, with one for each value: it stays in the first cache.
class Spread {
 public:
  // Each of n weights once for each channel.
  const char* fill(WeightType type, const char* from, int64_t n, int64_t channels) {
    if (type == WeightType::boolean) fill(reinterpret_cast<const uint8_t*>(from), n, channels);
    if (type == WeightType::float32) fill(reinterpret_cast<const float*>(from), n, channels);
    if (type == WeightType::float64) fill(reinterpret_cast<const double*>(from), n, channels);
    return bytes_;
  }

 private:
  static constexpr int64_t kChunk = 16;  // bytes that are written at a time

  // What a chunk has too much the next overwrites.
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

  alignas(kBytes) char bytes_[kWidestJoined * sizeof(double) + kChunk];
};

// Whether the walk's rows were joined from several positions each.
BN_INLINE bool joined(const Walk& w, const Weights& weights) { return weights && w.channels > weights.channels; }

// The weights of the run at `at`, or of so many rows from there on.
BN_INLINE RunWeights weights_of(const Walk& w, const Weights& weights, int64_t at, int64_t rows, Spread& room) {
  if (!weights) return {WeightType::none, nullptr, false};
  const auto* values = static_cast<const char*>(weights.values);
  const int64_t size = size_of(weights.type);
  if (!w.rows()) return {weights.type, values + (at / (w.channels * w.inner) * w.inner + at % w.inner) * size, false};
  values += at / weights.channels * size;
  if (!joined(w, weights)) return {weights.type, values, true};
  return {weights.type, room.fill(weights.type, values, rows * w.channels / weights.channels, weights.channels), false};
}

// Those of a later row.
BN_INLINE RunWeights row_weights(const RunWeights& first, const Walk& w, int64_t row) {
  return {first.type, first.values + row * (first.same ? 1 : w.channels) * size_of(first.type), first.same};
}

}  // namespace
