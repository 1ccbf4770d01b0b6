// Vectors of the width that this file's compiler flags allow, in the vector extensions that GCC and Clang share.
//
// Everything is in an unnamed namespace: kernels.cpp is compiled once for each instruction set, and no function of one
// may be merged with its twin of another by the linker.
#pragma once

#include <cstdint>
#include <cstring>

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

BN_INLINE Floats splat(float x) { return x - Floats{}; }
BN_INLINE Doubles splat_double(double x) { return x - Doubles{}; }

BN_INLINE Wide widen(Floats v) {
  HalfFloats halves[2];
  std::memcpy(halves, &v, sizeof v);
  return {__builtin_convertvector(halves[0], Doubles), __builtin_convertvector(halves[1], Doubles)};
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
