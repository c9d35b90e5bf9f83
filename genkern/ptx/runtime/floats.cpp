// Directed rounding, and the narrow formats in every direction.
#include "floats.h"

#include <fenv.h>

#include "conversions.h"

namespace ptx {

namespace {

// The machine's rounding mode for as long as this lives.
class Direction {
 public:
  explicit Direction(int round) : before_(fegetround()) {
    fesetround(round == rz   ? FE_TOWARDZERO
               : round == rm ? FE_DOWNWARD
               : round == rp ? FE_UPWARD
                             : FE_TONEAREST);
  }
  ~Direction() { fesetround(before_); }

 private:
  int before_;
};

// Hidden from the optimiser, which knows nothing of rounding modes.
template <class T>
T opaque(T x) {
  volatile T kept = x;
  return kept;
}

}  // namespace

#define GENKERN_DIRECTED(type)                             \
  type add_directed(type a, type b, int round) {           \
    const Direction direction(round);                      \
    return opaque(opaque(a) + opaque(b));                  \
  }                                                        \
  type mul_directed(type a, type b, int round) {           \
    const Direction direction(round);                      \
    return opaque(opaque(a) * opaque(b));                  \
  }                                                        \
  type fma_directed(type a, type b, type c, int round) {   \
    const Direction direction(round);                      \
    return opaque(fused(opaque(a), opaque(b), opaque(c))); \
  }                                                        \
  type div_directed(type a, type b, int round) {           \
    const Direction direction(round);                      \
    return opaque(opaque(a) / opaque(b));                  \
  }                                                        \
  type sqrt_directed(type a, int round) {                  \
    const Direction direction(round);                      \
    return opaque(root(opaque(a)));                        \
  }
GENKERN_DIRECTED(f32)
GENKERN_DIRECTED(f64)
#undef GENKERN_DIRECTED

f32 single_directed(f64 x, int round) {
  const Direction direction(round);
  return opaque(f32(opaque(x)));
}

f64 integral(f64 x, int round) {
  switch (round) {
    case rzi:
      return ::trunc(x);
    case rmi:
      return ::floor(x);
    case rpi:
      return ::ceil(x);
    default: {
      const Direction direction(rn);
      return opaque(::nearbyint(opaque(x)));
    }
  }
}

f32 single_of(u64 magnitude, bool negative, int round) {
  const Direction direction(round);
  if (negative) return opaque(-f32(1)) * opaque(f32(0)) + opaque(f32(-s64(opaque(magnitude))));
  return opaque(f32(opaque(magnitude)));
}
f64 double_of(u64 magnitude, bool negative, int round) {
  const Direction direction(round);
  if (negative) return opaque(f64(-s64(opaque(magnitude))));
  return opaque(f64(opaque(magnitude)));
}

u16 narrow_bits(f64 x, int digits, int least, int greatest, int round) {
  const bool negative = bit_cast<u64>(x) >> 63;
  const u16 sign = negative ? 0x8000 : 0,
            infinity = u16(((greatest + 1 - least + 1)) << (digits - 1));
  if (x != x) return 0x7fff;
  const f64 magnitude = ::fabs(x);
  if (magnitude - magnitude != 0) return sign | infinity;
  if (magnitude == 0) return sign;
  int exponent;
  frexp(magnitude, &exponent);  // magnitude = [0.5, 1) · 2^exponent
  const int unit = (exponent - 1 < least ? least : exponent - 1) - (digits - 1);
  const f64 scaled = ldexp(magnitude, -unit), down = ::floor(scaled), rest = scaled - down;
  bool away = false;
  if (round == rp)
    away = !negative && rest > 0;
  else if (round == rm)
    away = negative && rest > 0;
  else if (round == rna)
    away = rest >= 0.5;
  else if (round == rn)
    away = rest > 0.5 || (rest == 0.5 && (u64(down) & 1));
  u64 mantissa = u64(down) + away;
  int top = unit + digits - 1;  // the exponent of a mantissa whose hidden bit is set
  if (mantissa >> digits) mantissa >>= 1, ++top;
  if (top > greatest) {
    const bool largest = round == rz || (round == rp && negative) || (round == rm && !negative);
    return sign | u16(infinity - (largest ? 1 : 0));
  }
  if (!(mantissa >> (digits - 1))) return sign | u16(mantissa);  // subnormal
  const u64 hidden = u64(1) << (digits - 1);
  return sign | u16(u64(top - least + 1) << (digits - 1) | (mantissa & (hidden - 1)));
}

f32 tf32_rounded(f32 x, int round) {
  if (is_nan(x) || x - x != 0) return x;
  u32 bits = bit_cast<u32>(x);
  if (round == rna)
    bits += 0x1000u;
  else if (round == rn)
    bits += 0xfffu + (bits >> 13 & 1);
  return bit_cast<f32>(bits & 0xffffe000u);
}

}  // namespace ptx
