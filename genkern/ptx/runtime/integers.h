// Integer and bit instructions whose meaning C++ does not spell the same way.
#pragma once

#include "types.h"

namespace ptx {

// Division by zero: PTX leaves the value open; the hardware gives all ones.
template <class T>
inline T quotient(T a, T b) {
  if (b == 0) return T(~T(0));
  if (b == T(-1) && T(-1) < T(0)) return T(0) - a;
  return a / b;
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return T(~T(0));
  if (b == T(-1) && T(-1) < T(0)) return 0;
  return a % b;
}

// A shift by more than the width gives zero, or copies of the sign.
template <class T>
inline T shift_left(T a, u32 by) {
  return by < 8 * sizeof(T) ? T(a << by) : T(0);
}
template <class T>
inline T shift_right(T a, u32 by) {
  const u32 width = 8 * sizeof(T);
  return T(a >> (by < width ? by : width - 1)) & (by < width || T(-1) < T(0) ? T(~T(0)) : T(0));
}

inline u16 high_product(u16 a, u16 b) { return u16((u32(a) * b) >> 16); }
inline s16 high_product(s16 a, s16 b) { return s16((s32(a) * b) >> 16); }
inline u32 high_product(u32 a, u32 b) { return u32((u64(a) * b) >> 32); }
inline s32 high_product(s32 a, s32 b) { return s32((s64(a) * b) >> 32); }
inline u64 high_product(u64 a, u64 b) { return u64((u128(a) * b) >> 64); }
inline s64 high_product(s64 a, s64 b) { return s64((s128(a) * b) >> 64); }

inline s32 saturated(s64 x) {
  return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : s32(x);
}
inline s64 product24(s32 a, s32 b) { return s64(s32(u32(a) << 8) >> 8) * (s32(u32(b) << 8) >> 8); }
inline u64 product24(u32 a, u32 b) { return u64(a & 0xffffff) * (b & 0xffffff); }

template <class T>
inline T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T greatest(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T distance(T a, T b) {
  return a < b ? b - a : a - b;
}

inline u32 population(u32 a) { return u32(__builtin_popcount(a)); }
inline u32 population(u64 a) { return u32(__builtin_popcountll(a)); }
inline u32 leading_zeros(u32 a) { return a ? u32(__builtin_clz(a)) : 32; }
inline u32 leading_zeros(u64 a) { return a ? u32(__builtin_clzll(a)) : 64; }
template <class T>
inline T bits_reversed(T a) {
  T result = 0;
  for (u32 i = 0; i < 8 * sizeof(T); ++i) result = T(result << 1) | T((a >> i) & 1);
  return result;
}

// The position of the highest bit that differs from the sign; ~0 where there is none. `Shift`: how
// far it must be shifted to lie at the top.
template <int Shift, class T>
inline u32 highest_bit(T a) {
  u64 x = u64(T(-1) < T(0) && a < T(0) ? T(~a) : a);
  if (sizeof(T) == 4) x &= 0xffffffffu;
  if (x == 0) return ~0u;
  const u32 position = 63 - leading_zeros(x);
  return Shift ? u32(8 * sizeof(T) - 1 - position) : position;
}

template <class T>
inline T field_extract(T a, u32 position, u32 length) {
  const u32 width = 8 * sizeof(T), at = position & 255, count = length & 255;
  if (count == 0) return 0;
  T result = 0;
  const u32 last = at + count - 1 < width - 1 ? at + count - 1 : width - 1;
  const bool sign = T(-1) < T(0) && ((a >> last) & 1);
  for (u32 i = 0; i < width; ++i) {
    const u64 bit = i < count && at + i < width ? u64((a >> (at + i)) & 1) : u64(sign);
    result = T(u64(result) | bit << i);
  }
  return result;
}
template <class T>
inline T field_insert(T a, T b, u32 position, u32 length) {
  const u32 width = 8 * sizeof(T), at = position & 255, count = length & 255;
  T result = b;
  for (u32 i = 0; i < count && at + i < width; ++i)
    result = T((result & ~(T(1) << (at + i))) | (((a >> i) & 1) << (at + i)));
  return result;
}

// Any function of three bits: bit (a, b, c) of the table.
inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  if (table & 0x01) result |= ~a & ~b & ~c;
  if (table & 0x02) result |= ~a & ~b & c;
  if (table & 0x04) result |= ~a & b & ~c;
  if (table & 0x08) result |= ~a & b & c;
  if (table & 0x10) result |= a & ~b & ~c;
  if (table & 0x20) result |= a & ~b & c;
  if (table & 0x40) result |= a & b & ~c;
  if (table & 0x80) result |= a & b & c;
  return result;
}

inline u32 bytes_permuted(u32 a, u32 b, u32 selectors) {
  const u64 pool = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 selector = selectors >> (4 * i) & 15;
    u32 byte = u32(pool >> (8 * (selector & 7))) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// b above a, shifted; the upper word going left, the lower word going right.
inline u32 funnel_left(u32 a, u32 b, u32 by) {
  return by == 0 ? b : by >= 32 ? a : b << by | a >> (32 - by);
}
inline u32 funnel_right(u32 a, u32 b, u32 by) {
  return by == 0 ? a : by >= 32 ? b : b << (32 - by) | a >> by;
}

template <class A, class B, class T>
inline T byte_dot(u32 a, u32 b, T c) {
  for (int i = 0; i < 4; ++i) c = T(u32(c) + u32(s32(A(u8(a >> 8 * i))) * s32(B(u8(b >> 8 * i)))));
  return c;
}

inline u32 sign_extended(u32 a, u32 width, bool is_signed) {
  if (width == 0) return 0;
  if (width >= 32) return a;
  const u32 low = a << (32 - width);
  return is_signed ? u32(s32(low) >> (32 - width)) : low >> (32 - width);
}

}  // namespace ptx
