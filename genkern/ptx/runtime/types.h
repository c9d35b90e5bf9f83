// The types of PTX as C++ knows them, and the words that rules hand on as template arguments.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ptx {

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using u128 = unsigned __int128;
using s128 = __int128;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using f64 = double;
using pred = bool;

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "the sizes differ");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// A half or a bfloat16 by its bits, alone or two in a register.
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
template <class H>
struct Two {
  H low, high;
};
using f16x2 = Two<f16>;
using bf16x2 = Two<bf16>;
using f32x2 = Two<f32>;

// Modifiers by their PTX names; what an instruction does not say is `none`.
constexpr int none = 0;
constexpr int rn = 0, rz = 1, rm = 2, rp = 3, rna = 4;
constexpr int rni = 0, rzi = 1, rmi = 2, rpi = 3;
constexpr int ftz = 1, sat = 1, relu = 1, NaN = 1, abs_ = 1, xorsign_abs = 1;

inline f32 flushed(f32 x) {
  const u32 bits = bit_cast<u32>(x);
  return bits & 0x7f800000u ? x : bit_cast<f32>(bits & 0x80000000u);
}
template <int Flush>
inline f32 flush(f32 x) {
  return Flush ? flushed(x) : x;
}
template <int Flush>
inline f64 flush(f64 x) {
  return x;
}

}  // namespace ptx
