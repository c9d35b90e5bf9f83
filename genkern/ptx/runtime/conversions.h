// cvt between every pair of types, and the narrow floats: rounded once, in the direction asked for.
#pragma once

#include "floats.h"
#include "types.h"

namespace ptx {

// A format of few bits: digits of the mantissa (the hidden one too), exponent of the least normal.
template <class H>
struct Narrow;
template <>
struct Narrow<f16> {
  static constexpr int digits = 11, least = -14, greatest = 15;
};
template <>
struct Narrow<bf16> {
  static constexpr int digits = 8, least = -126, greatest = 127;
};

// x rounded to the format and encoded. Out of line: rare directions and doubles.
u16 narrow_bits(f64 x, int digits, int least, int greatest, int round);
// Rounded to an integral value.
f64 integral(f64 x, int round);

inline f32 wide(bf16 x) { return bit_cast<f32>(u32(x.bits) << 16); }
inline f32 wide(f16 x) {
  const u32 sign = u32(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<f32>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return bit_cast<f32>(sign | ((rest << 13) + (112u << 23)));
  return bit_cast<f32>(sign | bit_cast<u32>(f32(rest) * 0x1p-24f));
}

template <class H>
inline H narrow(f64 x, int round = rn) {
  return H{narrow_bits(x, Narrow<H>::digits, Narrow<H>::least, Narrow<H>::greatest, round)};
}
template <class H>
inline H nearest(f32 x) {
  return narrow<H>(x);
}
template <>
inline bf16 nearest<bf16>(f32 x) {
  const u32 bits = bit_cast<u32>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 nearest<f16>(f32 x) {
  const u32 bits = bit_cast<u32>(x), magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x38800000u || magnitude >= 0x47800000u) return narrow<f16>(x);
  const u32 even = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return f16{u16((bits >> 16 & 0x8000u) | (even - (112u << 23)) >> 13)};
}

inline f64 value(f32 x) { return x; }
inline f64 value(f64 x) { return x; }
inline f64 value(f16 x) { return wide(x); }
inline f64 value(bf16 x) { return wide(x); }

f32 single_directed(f64 x, int round);

// A double, given its target's type, its rounding and its flags.
template <class To>
struct Rounded;
template <>
struct Rounded<f64> {
  static f64 of(f64 x, int) { return x; }
};
template <>
struct Rounded<f32> {
  static f32 of(f64 x, int round) { return round == rn ? f32(x) : single_directed(x, round); }
};
template <>
struct Rounded<f16> {
  static f16 of(f64 x, int round) { return narrow<f16>(x, round); }
};
template <>
struct Rounded<bf16> {
  static bf16 of(f64 x, int round) { return narrow<bf16>(x, round); }
};

inline f64 clamped(f64 x, int saturated, int rectified) {
  if (saturated) return x > 0 ? (x < 1 ? x : 1) : 0;
  if (rectified) return is_nan(x) ? x : x > 0 ? x : 0;
  return x;
}

template <int Flush>
inline f16 flush(f16 x) {
  return x;
}
template <int Flush>
inline bf16 flush(bf16 x) {
  return x;
}

// Float to float.
template <class To, int Round, int Flush, int Saturate, int Rectify, class From>
inline To convert(From x) {
  f64 from = value(x);
  if (Flush && sizeof(From) == 4) from = flushed(f32(from));
  return flush<Flush>(Rounded<To>::of(clamped(from, Saturate, Rectify), Round));
}
template <>
inline bf16 convert<bf16, rn, none, none, none, f32>(f32 x) {
  return nearest<bf16>(x);
}
template <>
inline f16 convert<f16, rn, none, none, none, f32>(f32 x) {
  return nearest<f16>(x);
}
template <>
inline f32 convert<f32, rn, none, none, none, f16>(f16 x) {
  return wide(x);
}
template <>
inline f32 convert<f32, rn, none, none, none, bf16>(bf16 x) {
  return wide(x);
}

// Float to integral float.
template <class T, int Round, int Flush, int Saturate>
inline T to_integral(T x) {
  f64 from = value(x);
  if (Flush && sizeof(T) == 4) from = flushed(f32(from));
  return Rounded<T>::of(clamped(integral(from, Round), Saturate, none), rn);
}

// Float to integer: clamped to the target's range; NaN is 0, in 64 bits the sign bit alone.
template <class To, int Round, int Flush, class From>
inline To to_integer(From x) {
  constexpr bool is_signed = To(-1) < To(0);
  constexpr int bits = 8 * sizeof(To);
  f64 from = value(x);
  if (Flush && sizeof(From) == 4) from = flushed(f32(from));
  if (is_nan(from)) return bits == 64 ? To(u64(1) << 63) : To(0);
  const f64 whole = integral(from, Round);
  const f64 end = ldexp(1.0, is_signed ? bits - 1 : bits);
  if (whole >= end) return is_signed ? To((u64(1) << (bits - 1)) - 1) : To(~u64(0));
  if (is_signed) return whole < -end ? To(u64(1) << (bits - 1)) : To(s64(whole));
  return whole <= 0 ? To(0) : To(u64(whole));
}

// Integer to float. 64-bit integers may need more than a double's digits.
f32 single_of(u64 magnitude, bool negative, int round);
f64 double_of(u64 magnitude, bool negative, int round);

template <class To>
struct FromInteger;
template <>
struct FromInteger<f32> {
  static f32 of(u64 magnitude, bool negative, int round) {
    return single_of(magnitude, negative, round);
  }
};
template <>
struct FromInteger<f64> {
  static f64 of(u64 magnitude, bool negative, int round) {
    return double_of(magnitude, negative, round);
  }
};
template <class H>
struct FromInteger {
  static H of(u64 magnitude, bool negative, int round) {
    // Beyond 2^53 a half has long overflowed; a bfloat16 keeps the sticky bit.
    if (magnitude >> 53) magnitude = magnitude >> 11 << 11 | u64((magnitude & 2047) != 0) << 11;
    return narrow<H>(negative ? -f64(magnitude) : f64(magnitude), round);
  }
};

template <class To, int Round, int Saturate, class From>
inline To from_integer(From x) {
  const bool negative = x < From(0);
  const u64 magnitude = negative ? u64(0) - u64(s64(x)) : u64(x);
  const To result = FromInteger<To>::of(magnitude, negative, Round);
  return Saturate ? Rounded<To>::of(clamped(value(result), sat, none), rn) : result;
}

// Integer to integer; saturated: clamped to the target's range.
template <class To, int Saturate, class From>
inline To integer(From x) {
  if (!Saturate) return To(x);
  const s128 least = To(-1) < To(0) ? -(s128(1) << (8 * sizeof(To) - 1)) : s128(0);
  const s128 most = (s128(1) << (8 * sizeof(To) - (To(-1) < To(0) ? 1 : 0))) - 1;
  const s128 wide = s128(x);
  return To(wide < least ? least : wide > most ? most : wide);
}

// To tf32: ten digits behind the point; ties away from zero for .rna.
f32 tf32_rounded(f32 x, int round);

}  // namespace ptx
