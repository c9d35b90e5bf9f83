// Arithmetic of f16 and bf16, alone and in pairs: computed wide, rounded once.
//
// A float holds more than twice the digits of a half, so sums, products, quotients and roots that
// were rounded to a float round to the same half. A fused product needs more: its double sum is
// rounded to odd, which keeps the last rounding honest.
#pragma once

#include "conversions.h"

namespace ptx {

inline f64 odd_sum(f64 a, f64 b) {
  const f64 sum = a + b, part = sum - a;
  const f64 error = (a - (sum - part)) + (b - part);
  if (error == 0 || !(error == error) || sum - sum != 0) return sum;
  const u64 bits = bit_cast<u64>(sum);
  if (bits & 1) return sum;
  // Toward the true value: away from zero where the error has the sum's sign.
  return bit_cast<f64>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

template <int Saturate, int Rectify, class H>
inline H half_result(H x) {
  if (!Saturate && !Rectify) return x;
  const f32 v = wide(x);
  if (is_nan(v)) return Saturate ? H{0} : H{0x7fff};
  if (v <= 0) return Saturate || v < 0 || (x.bits & 0x8000) ? H{0} : x;
  return Saturate && v > 1 ? narrow<H>(1.0) : x;
}
template <int Flush>
inline f16 half_flush(f16 x) {
  return Flush && !(x.bits & 0x7c00) ? f16{u16(x.bits & 0x8000)} : x;
}
template <int Flush>
inline bf16 half_flush(bf16 x) {
  return x;
}

template <int Flush, int Saturate, class H>
inline H half_add(H a, H b) {
  const f32 sum = wide(half_flush<Flush>(a)) + wide(half_flush<Flush>(b));
  return half_result<Saturate, none>(half_flush<Flush>(nearest<H>(sum)));
}
template <int Flush, int Saturate, class H>
inline H half_mul(H a, H b) {
  const f32 product = wide(half_flush<Flush>(a)) * wide(half_flush<Flush>(b));
  return half_result<Saturate, none>(half_flush<Flush>(nearest<H>(product)));
}
template <class H>
inline H half_negated(H a) {
  return H{u16(a.bits ^ 0x8000)};
}
template <class H>
inline H half_absolute(H a) {
  return H{u16(a.bits & 0x7fff)};
}
template <int Flush, int Saturate, class H>
inline H half_sub(H a, H b) {
  const f32 difference = wide(half_flush<Flush>(a)) - wide(half_flush<Flush>(b));
  return half_result<Saturate, none>(half_flush<Flush>(nearest<H>(difference)));
}
template <int Flush, int Saturate, int Rectify, class H>
inline H half_fma(H a, H b, H c) {
  const f64 product = f64(wide(half_flush<Flush>(a))) * wide(half_flush<Flush>(b));
  const f64 sum = odd_sum(product, wide(half_flush<Flush>(c)));
  return half_result<Saturate, Rectify>(half_flush<Flush>(narrow<H>(sum)));
}
template <int Flush, int Nan, int XorSign, class H>
inline H half_minimum(H a, H b) {
  const f32 x = wide(half_flush<Flush>(a)), y = wide(half_flush<Flush>(b));
  const f32 least = minimum<none, Nan, XorSign>(x, y);
  return is_nan(least) ? H{0x7fff} : nearest<H>(least);
}
template <int Flush, int Nan, int XorSign, class H>
inline H half_maximum(H a, H b) {
  const f32 x = wide(half_flush<Flush>(a)), y = wide(half_flush<Flush>(b));
  const f32 most = maximum<none, Nan, XorSign>(x, y);
  return is_nan(most) ? H{0x7fff} : nearest<H>(most);
}
template <class H>
inline H half_exp2(H a) {
  return narrow<H>(::exp2(f64(wide(a))));
}
template <class H>
inline H half_tanh(H a) {
  return narrow<H>(::tanh(f64(wide(a))));
}

// The same for both elements of a register.
template <class H, class F>
inline Two<H> each(Two<H> a, F f) {
  return {f(a.low), f(a.high)};
}
template <class H, class F>
inline Two<H> each(Two<H> a, Two<H> b, F f) {
  return {f(a.low, b.low), f(a.high, b.high)};
}
template <class H, class F>
inline Two<H> each(Two<H> a, Two<H> b, Two<H> c, F f) {
  return {f(a.low, b.low, c.low), f(a.high, b.high, c.high)};
}

}  // namespace ptx
