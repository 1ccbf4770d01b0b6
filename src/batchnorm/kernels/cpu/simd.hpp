// Vectors of the width that this file's compiler flags allow, in the vector extensions that GCC and Clang share.
//
// Everything is in an unnamed namespace: kernels.cpp is compiled once for each instruction set, and no function of one
// may be merged with its twin of another by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define BN_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int64_t kLanes = kBytes / sizeof(float);

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));
typedef double Doubles __attribute__((vector_size(kBytes)));

// The float lanes of one vector as doubles: two vectors.
struct Wide {
  Doubles low, high;
};

template <class V, class T>
BN_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);  // unaligned: the compiler makes it one load
  return v;
}

template <class V, class T>
BN_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// The same value, loaded in full. Without this GCC turns a load and a comparison into a masked load, which AVX-512
// machines start only when the mask is known: measured, 2.7 times slower on data that come from memory.
BN_INLINE Floats loaded(Floats v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

BN_INLINE Floats splat(float x) { return x - Floats{}; }
BN_INLINE Doubles splat_double(double x) { return x - Doubles{}; }

template <int First, int... I>
BN_INLINE HalfFloats half_of(Floats v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (First + I)...);
}

BN_INLINE Wide widen(Floats v) {
  using Half = std::make_integer_sequence<int, kLanes / 2>;
  return {__builtin_convertvector(half_of<0>(v, Half{}), Doubles),
          __builtin_convertvector(half_of<kLanes / 2>(v, Half{}), Doubles)};
}

BN_INLINE Wide load_wide(const float* p) {
  return {__builtin_convertvector(load<HalfFloats>(p), Doubles),
          __builtin_convertvector(load<HalfFloats>(p + kLanes / 2), Doubles)};
}

BN_INLINE double sum(Doubles v) {
  double total = 0;
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(double)); ++i) total += v[i];
  return total;
}

}  // namespace
