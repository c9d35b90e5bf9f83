// The vectors of the power method on their way in and out of the sum type; for kernel files.
#pragma once

#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {
namespace spectral {

// Vectors of length n are allocated at padded<A>(n), so that whole vectors may be read and written.
template <class A>
constexpr int64_t padded(int64_t n) {
  return (n + lanes<A>() - 1) / lanes<A>() * lanes<A>();
}

template <class To, class From>
inline void convert_one(const From* from, To* to) {
  if constexpr (sizeof(To) < sizeof(From))
    store_one(to, *from);
  else
    *to = load_one(from);
}

// to = from, one of them in the sum type.
template <class To, class From>
inline void convert(const From* from, int64_t n, To* to) {
  if constexpr (sizeof(To) == sizeof(From))
    copy(to, from, n);
  else
    for (int64_t i = 0; i < n; ++i) convert_one(from + i, to + i);
}

// The same for a matrix [leading, n / leading], which becomes its transpose.
template <class To, class From>
inline void transpose(const From* from, int64_t leading, int64_t n, To* to) {
  if (leading == 1 || leading == n) return convert(from, n, to);
  const int64_t trailing = n / leading;
  for (int64_t j = 0; j < trailing; ++j)
    for (int64_t i = 0; i < leading; ++i)
      convert_one(from + i * trailing + j, to + j * leading + i);
}

}  // namespace spectral
}  // namespace GK_LEVEL
}  // namespace genkern
