// Floating-point arithmetic with PTX's roundings: each result is rounded once.
//
// To nearest is the machine's own; the other directions set the machine's rounding mode around the
// operation, out of line. The approximate instructions (ex2.approx, …) give the correctly rounded
// value: the hardware's error is at most two units, its bits are no part of the contract.
#pragma once

#include <math.h>

#include "types.h"

namespace ptx {

f32 add_directed(f32 a, f32 b, int round);
f64 add_directed(f64 a, f64 b, int round);
f32 mul_directed(f32 a, f32 b, int round);
f64 mul_directed(f64 a, f64 b, int round);
f32 fma_directed(f32 a, f32 b, f32 c, int round);
f64 fma_directed(f64 a, f64 b, f64 c, int round);
f32 div_directed(f32 a, f32 b, int round);
f64 div_directed(f64 a, f64 b, int round);
f32 sqrt_directed(f32 a, int round);
f64 sqrt_directed(f64 a, int round);

inline f32 fused(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f64 fused(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }
inline f32 root(f32 a) { return __builtin_sqrtf(a); }
inline f64 root(f64 a) { return __builtin_sqrt(a); }

template <int Saturate, class T>
inline T saturate(T x) {
  if (!Saturate) return x;
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);  // NaN becomes +0
}
template <int Flush, int Saturate, class T>
inline T finished(T x) {
  return saturate<Saturate>(flush<Flush>(x));
}

template <int Round, int Flush, int Saturate, class T>
inline T add(T a, T b) {
  a = flush<Flush>(a), b = flush<Flush>(b);
  return finished<Flush, Saturate>(Round == rn ? a + b : add_directed(a, b, Round));
}
template <int Round, int Flush, int Saturate, class T>
inline T mul(T a, T b) {
  a = flush<Flush>(a), b = flush<Flush>(b);
  return finished<Flush, Saturate>(Round == rn ? a * b : mul_directed(a, b, Round));
}
template <int Round, int Flush, int Saturate, class T>
inline T fma(T a, T b, T c) {
  a = flush<Flush>(a), b = flush<Flush>(b), c = flush<Flush>(c);
  return finished<Flush, Saturate>(Round == rn ? fused(a, b, c) : fma_directed(a, b, c, Round));
}
template <int Round, int Flush, class T>
inline T div(T a, T b) {
  a = flush<Flush>(a), b = flush<Flush>(b);
  return flush<Flush>(Round == rn ? a / b : div_directed(a, b, Round));
}
template <int Round, int Flush, class T>
inline T sqrt(T a) {
  a = flush<Flush>(a);
  return flush<Flush>(Round == rn ? root(a) : sqrt_directed(a, Round));
}

template <class T>
inline bool is_nan(T x) {
  return x != x;
}
template <class T>
inline T quiet_nan();
template <>
inline f32 quiet_nan<f32>() {
  return bit_cast<f32>(0x7fffffffu);
}
template <>
inline f64 quiet_nan<f64>() {
  return bit_cast<f64>(u64(0x7ff8000000000000));
}
inline bool sign_of(f32 x) { return bit_cast<u32>(x) >> 31; }
inline bool sign_of(f64 x) { return bit_cast<u64>(x) >> 63; }
inline f32 absolute(f32 x) { return bit_cast<f32>(bit_cast<u32>(x) & 0x7fffffffu); }
inline f64 absolute(f64 x) { return bit_cast<f64>(bit_cast<u64>(x) & 0x7fffffffffffffffu); }
inline f32 negated(f32 x) { return bit_cast<f32>(bit_cast<u32>(x) ^ 0x80000000u); }
inline f64 negated(f64 x) { return bit_cast<f64>(bit_cast<u64>(x) ^ 0x8000000000000000u); }

template <int Absolute>
inline f32 magnitude(f32 x) {
  return Absolute ? absolute(x) : x;
}

// A NaN loses against a number, unless .NaN; -0 lies below +0.
template <int Flush, int Nan, int XorSign, class T>
inline T minimum(T a, T b) {
  a = flush<Flush>(a), b = flush<Flush>(b);
  const bool flip = XorSign && sign_of(a) != sign_of(b);
  if (XorSign) a = absolute(a), b = absolute(b);
  T result;
  if (is_nan(a) || is_nan(b))
    result = Nan || (is_nan(a) && is_nan(b)) ? quiet_nan<T>() : is_nan(a) ? b : a;
  else
    result = a < b ? a : b < a ? b : sign_of(a) ? a : b;
  return flip ? negated(result) : result;
}
template <int Flush, int Nan, int XorSign, class T>
inline T maximum(T a, T b) {
  a = flush<Flush>(a), b = flush<Flush>(b);
  const bool flip = XorSign && sign_of(a) != sign_of(b);
  if (XorSign) a = absolute(a), b = absolute(b);
  T result;
  if (is_nan(a) || is_nan(b))
    result = Nan || (is_nan(a) && is_nan(b)) ? quiet_nan<T>() : is_nan(a) ? b : a;
  else
    result = a > b ? a : b > a ? b : sign_of(a) ? b : a;
  return flip ? negated(result) : result;
}

inline f32 copy_sign(f32 from, f32 to) {
  return bit_cast<f32>((bit_cast<u32>(from) & 0x80000000u) | (bit_cast<u32>(to) & 0x7fffffffu));
}
inline f64 copy_sign(f64 from, f64 to) {
  return bit_cast<f64>((bit_cast<u64>(from) & 0x8000000000000000u) |
                       (bit_cast<u64>(to) & 0x7fffffffffffffffu));
}

// Computed in double and rounded to single: within half a unit and a hair.
template <int Flush>
inline f32 exp2_approximate(f32 x) {
  return flush<Flush>(f32(::exp2(f64(flush<Flush>(x)))));
}
template <int Flush>
inline f32 log2_approximate(f32 x) {
  return flush<Flush>(f32(::log2(f64(flush<Flush>(x)))));
}
template <int Flush>
inline f32 reciprocal_approximate(f32 x) {
  return flush<Flush>(1.0f / flush<Flush>(x));
}
template <int Flush>
inline f32 sqrt_approximate(f32 x) {
  return flush<Flush>(root(flush<Flush>(x)));
}
template <int Flush>
inline f32 rsqrt_approximate(f32 x) {
  return flush<Flush>(f32(1.0 / root(f64(flush<Flush>(x)))));
}
template <int Flush>
inline f32 sin_approximate(f32 x) {
  return flush<Flush>(f32(::sin(f64(flush<Flush>(x)))));
}
template <int Flush>
inline f32 cos_approximate(f32 x) {
  return flush<Flush>(f32(::cos(f64(flush<Flush>(x)))));
}
inline f32 tanh_approximate(f32 x) { return f32(::tanh(f64(x))); }

// The f64 seeds keep only the upper word of the result, with twenty bits of mantissa.
inline f64 upper_word(f64 x) { return bit_cast<f64>(bit_cast<u64>(x) & 0xffffffff00000000u); }
inline f64 normal_or_zero(f64 x) {
  return (bit_cast<u64>(x) & 0x7ff0000000000000u) ? x : copy_sign(x, 0.0);
}
inline f64 reciprocal_seed(f64 x) {
  return upper_word(normal_or_zero(1.0 / normal_or_zero(upper_word(x))));
}
inline f64 rsqrt_seed(f64 x) { return upper_word(1.0 / root(normal_or_zero(upper_word(x)))); }

}  // namespace ptx
