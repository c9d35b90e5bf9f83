// Vectors of GK_VECTOR_BYTES, written with the compilers' vector extension, so that one source
// serves every level and every architecture. For kernel files (compiled once per level).
//
//   Vec<T>             lanes<T>() values of T = float or double; + - * / and comparisons by the
//   language Acc<T>             the type in which elements of storage type T are computed: double
//   for double,
//                      float for float, BFloat16 and Float16
//   load<T>(p), store  lanes<Acc<T>>() elements of storage T from or to any address, converted
//   load_part, store_part   the same for the first n lanes; the others read as zero, are not
//   written exp, tanh, twice_atanh, select, min, max, sum
#pragma once

#include <stdint.h>
#include <string.h>

#include "dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genkern {
namespace GK_LEVEL {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<BFloat16> {
  using type = float;
};
template <>
struct AccOf<Float16> {
  using type = float;
};
template <class T>
using Acc = typename AccOf<T>::type;

// run(T{}) for the storage type T that `dtype` names.
template <class Run>
inline Status for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::f64:
      return run(double{});
    case DType::bf16:
      return run(BFloat16{});
    case DType::f16:
      return run(Float16{});
  }
  return Status::unknown_dtype;
}

template <class T, int bytes = GK_VECTOR_BYTES>
struct VecOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int lanes() {
  return GK_VECTOR_BYTES / int(sizeof(T));
}

// Integers as wide as T, for masks and bit tricks.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <class T>
using Mask = Vec<typename BitsOf<T>::type>;

using HalfBits = typename VecOf<uint16_t, GK_VECTOR_BYTES / 2>::type;
using WordBits = Vec<uint32_t>;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

inline Vec<float> select(Mask<float> mask, Vec<float> yes, Vec<float> no) {
  return mask ? yes : no;
}
inline Vec<double> select(Mask<double> mask, Vec<double> yes, Vec<double> no) {
  return mask ? yes : no;
}

// A NaN in `x` survives both; one in `bound` does not.
template <class V>
inline V max(V x, V bound) {
  return x < bound ? bound : x;
}
template <class V>
inline V min(V x, V bound) {
  return x > bound ? bound : x;
}

template <class T>
inline Mask<T> first_lanes(int64_t n) {
  Mask<T> index;
  for (int i = 0; i < lanes<T>(); ++i) index[i] = i;
  return index < typename BitsOf<T>::type(n);
}

inline float sum(Vec<float> x) {
  float total = 0;
  for (int i = 0; i < lanes<float>(); ++i) total += x[i];
  return total;
}
inline double sum(Vec<double> x) {
  double total = 0;
  for (int i = 0; i < lanes<double>(); ++i) total += x[i];
  return total;
}

// ---- Storage types ------------------------------------------------------------------------------

inline Vec<float> widen(BFloat16, HalfBits bits) {
  return bit_cast<Vec<float>>(WordBits(__builtin_convertvector(bits, WordBits) << 16));
}

inline HalfBits narrow(BFloat16, Vec<float> x) {  // to nearest, ties to even; a NaN stays quiet
  const WordBits word = bit_cast<WordBits>(x);
  const WordBits rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  const WordBits quiet = (word >> 16) | 0x40;
  const auto is_nan = x != x;
  return __builtin_convertvector(is_nan ? quiet : rounded, HalfBits);
}

#if defined(__F16C__) && GK_VECTOR_BYTES == 64
inline Vec<float> widen(Float16, HalfBits bits) {
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
}
inline HalfBits narrow(Float16, Vec<float> x) {
  return bit_cast<HalfBits>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__) && GK_VECTOR_BYTES == 32
inline Vec<float> widen(Float16, HalfBits bits) {
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
inline HalfBits narrow(Float16, Vec<float> x) {
  return bit_cast<HalfBits>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> widen(Float16, HalfBits bits) {
  const WordBits half = __builtin_convertvector(bits, WordBits);
  const WordBits sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  // Shifted into place the exponent is 112 too small; a multiplication mends that, subnormals
  // included.
  const Vec<float> scaled = bit_cast<Vec<float>>(WordBits(magnitude << 13)) * 0x1p112f;
  const WordBits special = (magnitude << 13) | 0x7f800000;
  const WordBits finite = bit_cast<WordBits>(scaled);
  return bit_cast<Vec<float>>(WordBits((magnitude >= 0x7c00 ? special : finite) | sign));
}
inline HalfBits narrow(Float16, Vec<float> x) {
  const WordBits word = bit_cast<WordBits>(x), sign = word & 0x80000000, magnitude = word ^ sign;
  // Normal results: rebias the exponent and round to nearest even on the 13 dropped bits.
  const WordBits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 lines the mantissa up with the half's last bit, and rounds.
  const Vec<float> aligned = bit_cast<Vec<float>>(magnitude) + 0.5f;
  const WordBits subnormal = bit_cast<WordBits>(aligned) - 0x3f000000;
  WordBits half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? WordBits{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? WordBits{} + 0x7e00 : half;
  return __builtin_convertvector(half | (sign >> 16), HalfBits);
}
#endif

template <class T>
inline Vec<Acc<T>> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    HalfBits bits;
    memcpy(&bits, from, sizeof bits);
    return widen(T{}, bits);
  } else {
    Vec<T> x;
    memcpy(&x, from, sizeof x);
    return x;
  }
}

template <class T>
inline void store(T* to, Vec<Acc<T>> x) {
  if constexpr (sizeof(T) == 2) {
    const HalfBits bits = narrow(T{}, x);
    memcpy(to, &bits, sizeof bits);
  } else {
    memcpy(to, &x, sizeof x);
  }
}

#if defined(__AVX512BW__) && GK_VECTOR_BYTES == 64 && !defined(__SANITIZE_ADDRESS__)
// By masks, which AddressSanitizer does not look at: a library's memcpy of some bytes, and a vector
// that must come back from memory, cost ten times as much.
inline __mmask16 first_bits(int64_t n) { return __mmask16((1u << n) - 1); }

inline Vec<float> load_part(const float* from, int64_t n) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(first_bits(n), from));
}
inline Vec<double> load_part(const double* from, int64_t n) {
  return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8(first_bits(n)), from));
}
template <class T>
inline Vec<float> load_part(const T* from, int64_t n) {
  return widen(T{}, bit_cast<HalfBits>(_mm256_maskz_loadu_epi16(first_bits(n), from)));
}

inline void store_part(float* to, Vec<float> x, int64_t n) {
  _mm512_mask_storeu_ps(to, first_bits(n), bit_cast<__m512>(x));
}
inline void store_part(double* to, Vec<double> x, int64_t n) {
  _mm512_mask_storeu_pd(to, __mmask8(first_bits(n)), bit_cast<__m512d>(x));
}
template <class T>
inline void store_part(T* to, Vec<float> x, int64_t n) {
  _mm256_mask_storeu_epi16(to, first_bits(n), bit_cast<__m256i>(narrow(T{}, x)));
}
#else
template <class T>
inline Vec<Acc<T>> load_part(const T* from, int64_t n) {
  T buffer[lanes<Acc<T>>()] = {};
  memcpy(buffer, from, size_t(n) * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_part(T* to, Vec<Acc<T>> x, int64_t n) {
  T buffer[lanes<Acc<T>>()];
  store(buffer, x);
  memcpy(to, buffer, size_t(n) * sizeof(T));
}
#endif

// A vector where n elements are left, or the part of one.
template <class T>
inline Vec<Acc<T>> load_some(const T* from, int64_t n) {
  return n >= lanes<Acc<T>>() ? load(from) : load_part(from, n);
}
template <class T>
inline void store_some(T* to, Vec<Acc<T>> x, int64_t n) {
  if (n >= lanes<Acc<T>>())
    store(to, x);
  else
    store_part(to, x, n);
}

// memcpy of n elements, which for n = 0 may have no address.
template <class T>
inline void copy(void* to, const T* from, int64_t n) {
  if (n > 0) memcpy(to, from, size_t(n) * sizeof(T));
}

// One element, converted.
template <class T>
inline Acc<T> load_one(const T* from) {
  return load_part(from, 1)[0];
}
template <class T>
inline void store_one(T* to, Acc<T> x) {
  store_part(to, splat(x), 1);
}

// ---- Elementary functions -----------------------------------------------------------------------

// 2^n for integral n in about ±(exponent range), as a product's factor.
inline Vec<float> scale_by_power(Vec<float> x, Vec<float> n) {
#if defined(__AVX512F__) && GK_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(x), bit_cast<__m512>(n)));
#else
  const Mask<float> whole = __builtin_convertvector(n, Mask<float>);
  const Mask<float> half = whole >> 1, rest = whole - half;
  return x * bit_cast<Vec<float>>(Mask<float>((half + 127) << 23)) *
         bit_cast<Vec<float>>(Mask<float>((rest + 127) << 23));
#endif
}
inline Vec<double> scale_by_power(Vec<double> x, Vec<double> n) {
#if defined(__AVX512F__) && GK_VECTOR_BYTES == 64
  return bit_cast<Vec<double>>(_mm512_scalef_pd(bit_cast<__m512d>(x), bit_cast<__m512d>(n)));
#else
  const Mask<double> whole = __builtin_convertvector(n, Mask<double>);
  const Mask<double> half = whole >> 1, rest = whole - half;
  return x * bit_cast<Vec<double>>(Mask<double>((half + 1023) << 52)) *
         bit_cast<Vec<double>>(Mask<double>((rest + 1023) << 52));
#endif
}

// e^x within 2 units in the last place; inf above the range, NaN for NaN, and 0 where the result
// would be subnormal: computing those costs the processor a hundred times a normal one.
// x = n·ln2 + r, |r| ≤ ln2/2; Taylor's polynomial of e^r is exact enough at these degrees.
inline Vec<float> exp(Vec<float> x) {
  const Mask<float> vanishes = x < -87.33654f;
  x = select(vanishes, splat(-87.f), min(x, splat(89.f)));
  constexpr float round_to_integer = 12582912.f;
  const Vec<float> n = (x * 1.44269504f + round_to_integer) - round_to_integer;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return select(vanishes, Vec<float>{}, scale_by_power(p, n));
}
inline Vec<double> exp(Vec<double> x) {
  const Mask<double> vanishes = x < -708.3964185322641;
  x = select(vanishes, splat(-708.), min(x, splat(710.)));
  constexpr double round_to_integer = 6755399441055744.;
  const Vec<double> n = (x * 1.4426950408889634 + round_to_integer) - round_to_integer;
  const Vec<double> r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  Vec<double> p = splat(1. / 6227020800.);
  constexpr double coefficients[] = {
      1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720,
      1. / 120,       1. / 24,       1. / 6,       0.5,         1.,         1.};
  for (double c : coefficients) p = p * r + c;
  return select(vanishes, Vec<double>{}, scale_by_power(p, n));
}

// tanh x = e/(e + 2) with e = exp(2x) - 1 taken without cancellation, so that small x keep all
// their digits.
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> y = min(max(2.f * x, splat(-20.f)), splat(20.f));
  constexpr float round_to_integer = 12582912.f;
  const Vec<float> n = (y * 1.44269504f + round_to_integer) - round_to_integer;
  const Vec<float> r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.f / 5040);
  constexpr float coefficients[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f};
  for (float c : coefficients) p = p * r + c;
  const Vec<float> e = scale_by_power(p * r, n) + (scale_by_power(splat(1.f), n) - 1.f);
  return e / (e + 2.f);
}
inline Vec<double> tanh(Vec<double> x) {
  const Vec<double> y = min(max(2. * x, splat(-40.)), splat(40.));
  constexpr double round_to_integer = 6755399441055744.;
  const Vec<double> n = (y * 1.4426950408889634 + round_to_integer) - round_to_integer;
  const Vec<double> r = (y - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  Vec<double> p = splat(1. / 6227020800.);
  constexpr double coefficients[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880,
                                     1. / 40320,     1. / 5040,     1. / 720,     1. / 120,
                                     1. / 24,        1. / 6,        0.5,          1.};
  for (double c : coefficients) p = p * r + c;
  const Vec<double> e = scale_by_power(p * r, n) + (scale_by_power(splat(1.), n) - 1.);
  return e / (e + 2.);
}

// 2·atanh(z) for 0 ≤ z ≤ 1/3, with full relative accuracy at small z: log(1 + y) for y in [0, 1] at
// z = y/(2 + y).
inline Vec<float> twice_atanh(Vec<float> z) {
  const Vec<float> w = z * z;
  Vec<float> p = splat(1.f / 15);
  for (int odd = 13; odd >= 1; odd -= 2) p = p * w + 1.f / odd;
  return 2.f * z * p;
}
inline Vec<double> twice_atanh(Vec<double> z) {
  const Vec<double> w = z * z;
  Vec<double> p = splat(1. / 35);
  for (int odd = 33; odd >= 1; odd -= 2) p = p * w + 1. / odd;
  return 2. * z * p;
}

}  // namespace GK_LEVEL
}  // namespace genkern
