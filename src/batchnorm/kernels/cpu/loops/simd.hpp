// Vectors of the width that this file's compiler flags allow, in the vector extensions that GCC and Clang share, and
// the element types that are loaded into them.
//
// Everything is in an unnamed namespace, as in all of loops/: kernels.cpp is compiled once for each instruction set,
// and the linker must not merge a function of one with the same function of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>  // streaming stores, and where GCC's code for the portable form is poor: conversions and masks
#endif

#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));
typedef double Doubles __attribute__((vector_size(kBytes)));

template <class V>
constexpr int64_t kLanes = sizeof(V) / sizeof(V{}[0]);

template <class V>
using Scalar = std::remove_cvref_t<decltype(V{}[0])>;

template <class V, class T>
BN_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);  // unaligned: the compiler makes it one load
  return v;
}

template <class V, class T>
BN_INLINE void store_raw(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Past the caches, straight to memory: for outputs that are larger than the caches, which would otherwise read every
// line before they write it. `p` is aligned to the vector. Ordinary stores where the machine has none of these.
template <class T, class V>
BN_INLINE void stream_raw(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#endif
  store_raw(p, v);
}

template <class V, class T>
BN_INLINE V splat(T x) {
  return static_cast<Scalar<V>>(x) - V{};
}

BN_INLINE Floats as_floats(Bits b) { return reinterpret_cast<Floats>(b); }
BN_INLINE Bits as_bits(Floats v) { return reinterpret_cast<Bits>(v); }

// 16-bit integers to 32-bit ones and back. GCC takes the portable form apart, into two or three times the instructions.
BN_INLINE Bits extended(Halves h) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, Bits);
#endif
}

BN_INLINE Halves truncated(Bits b) {  // below 2^16
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(b), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
  return __builtin_convertvector(b, Halves);
#endif
}

// --- elements: how a value in memory becomes a value to compute with, and back, rounded to nearest even --------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Element;

template <>
struct Element<float> {
  using Vector = Floats;
  static BN_INLINE Floats load(const float* p) { return load_raw<Floats>(p); }
  static BN_INLINE Floats rounded(Floats v) { return v; }
};

template <>
struct Element<double> {
  using Vector = Doubles;
  static BN_INLINE Doubles load(const double* p) { return load_raw<Doubles>(p); }
  static BN_INLINE Doubles rounded(Doubles v) { return v; }
};

template <>
struct Element<BFloat16> {
  using Vector = Floats;
  static BN_INLINE Floats load(const BFloat16* p) { return widened(load_raw<Halves>(p)); }
  // A NaN stays one: being a result or a value of this type, it is quiet, and it has no low bits that would carry.
#if defined(__AVX512F__)
  // The upper halves of 32 bits are every second 16: a permutation puts them there, and gathers them again.
  static BN_INLINE Floats widened(Halves h) {
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper(kThere),
                                                              _mm512_castsi256_si512(reinterpret_cast<__m256i>(h))));
  }
  static BN_INLINE Halves rounded(Floats v) {
    const __m512i b = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(1 << 16));
    const __m512i sum = _mm512_mask_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd, b,
                                              _mm512_set1_epi32(0x8000));
    return reinterpret_cast<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper(kBack), sum)));
  }

 private:
  typedef uint16_t Words __attribute__((vector_size(64)));
  static constexpr Words kThere = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                   0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  static constexpr Words kBack = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  static BN_INLINE __m512i upper(Words w) { return reinterpret_cast<__m512i>(w); }
#else
  static BN_INLINE Floats widened(Halves h) { return as_floats(extended(h) << 16); }
  static BN_INLINE Halves rounded(Floats v) {
    const Bits b = as_bits(v);
    return truncated((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
#endif
};

// IEEE half precision: by the machine's own conversions, or by arithmetic on the bits, with the same results but for the
// bits of a NaN.
template <>
struct Element<Float16> {
  using Vector = Floats;
  static BN_INLINE Floats load(const Float16* p) { return widened(load_raw<Halves>(p)); }
#if defined(__AVX512F__)
  static BN_INLINE Floats widened(Halves h) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h)); }
  static BN_INLINE Halves rounded(Floats v) {
    return reinterpret_cast<Halves>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static BN_INLINE Floats widened(Halves h) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h)); }
  static BN_INLINE Halves rounded(Floats v) {
    return reinterpret_cast<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static BN_INLINE Floats widened(Halves halves) {
    const Bits h = extended(halves);
    const Bits magnitude = (h & 0x7fff) << 13;
    // The exponent's bias goes from 15 to 127; as a multiplication this is right for subnormal numbers too.
    const Bits finite = as_bits(as_floats(magnitude) * 0x1p112f);
    const Bits special = magnitude | 0x7f800000;
    return as_floats(((h & 0x8000) << 16) | (magnitude >= (0x7c00u << 13) ? special : finite));
  }
  static BN_INLINE Halves rounded(Floats v) {
    const Bits b = as_bits(v), sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    // Below 2^-14 the result is subnormal: adding 0.5 lets the addition round at the right bit.
    const Bits subnormal = as_bits(as_floats(a) + 0.5f) - 0x3f000000;
    const Bits normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    const Bits large = a > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;  // NaN, or what rounds to infinity
    const Bits magnitude = a >= 0x477ff000 ? large : (a < (113u << 23) ? subnormal : normal);
    return truncated(sign | magnitude);
  }
#endif
};

template <class T>
using Vector = typename Element<T>::Vector;

#if defined(__AVX2__)
constexpr int32_t kFirstFew[16] = {-1, -1, -1, -1, -1, -1, -1, -1};  // from 8 - n on, a mask of the first n
#endif

// The first n < kLanes values, and zeros; and back.
template <class T>
BN_INLINE Vector<T> load_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd((1u << n) - 1, p);
  if constexpr (sizeof(T) == 2)
    return Element<T>::widened(reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16((1u << n) - 1, p)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_maskload_ps(p, load_raw<__m256i>(kFirstFew + 8 - n));
  if constexpr (sizeof(T) == 8) return _mm256_maskload_pd(p, load_raw<__m256i>(kFirstFew + 8 - 2 * n));
#endif
  T values[kLanes<Vector<T>>] = {};
  std::memcpy(values, p, n * sizeof(T));
  return Element<T>::load(values);
}

template <class T>
BN_INLINE void store_part(T* p, Vector<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, (1u << n) - 1, reinterpret_cast<__m256i>(Element<T>::rounded(v)));
#endif
  T values[kLanes<Vector<T>>];
  store_raw(values, Element<T>::rounded(v));
  std::memcpy(p, values, n * sizeof(T));
}

// The first n lanes of v, and the rest of `fallback`.
template <class V, int... I>
BN_INLINE V first_lanes(V v, int64_t n, V fallback, std::integer_sequence<int, I...>) {
  using Lanes = decltype(v < fallback);
  const Lanes lane = {I...};
  return lane < splat<Lanes>(n) ? v : fallback;
}

template <class V>
BN_INLINE V first_lanes(V v, int64_t n, V fallback) {
  return first_lanes(v, n, fallback, std::make_integer_sequence<int, kLanes<V>>{});
}

// What a comparison of two V gives, and takes to choose between two others.
template <class V>
using Choice = decltype(V{} < V{});

// Which of kLanes<V> bytes are not 0.
template <class V>
BN_INLINE Choice<V> nonzero(const uint8_t* p) {
  Choice<V> lanes;
#if defined(__AVX512F__)
  if constexpr (kLanes<V> == 16)
    lanes = reinterpret_cast<Choice<V>>(_mm512_maskz_cvtepu8_epi32(0xffff, load_raw<__m128i>(p)));
  else
    lanes = reinterpret_cast<Choice<V>>(_mm512_maskz_cvtepu8_epi64(0xff, _mm_cvtsi64_si128(load_raw<int64_t>(p))));
#elif defined(__AVX2__)
  if constexpr (kLanes<V> == 8)
    lanes = reinterpret_cast<Choice<V>>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_raw<int64_t>(p))));
  else
    lanes = reinterpret_cast<Choice<V>>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load_raw<int32_t>(p))));
#else
  for (int i = 0; i < kLanes<V>; ++i) lanes[i] = p[i];
#endif
  return lanes != 0;
}

// The same value, loaded in full. Without this GCC turns a load and a comparison into a masked load, which AVX-512
// machines start only when the mask is known: measured, 2.7 times slower on data that come from memory.
template <class V>
BN_INLINE V loaded(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

}  // namespace
}  // namespace batchnorm
