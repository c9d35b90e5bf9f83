// Between tensors and scratch: conversion, padding, transposition. For kernel files.
#pragma once

#include "products.h"

namespace genkern {
namespace GK_LEVEL {

// to = factor·from, `rows` × `columns` converted; zeros up to `to_rows` × to.stride.
template <class T, class A>
inline void pack(Rows<A> to, Rows<const T> from, int64_t rows, int64_t columns, int64_t to_rows,
                 A factor) {
  constexpr int L = lanes<A>();
  for (int64_t i = 0; i < rows; ++i) {
    const T* source = from.row(i);
    A* target = to.row(i);
    int64_t j = 0;
    for (; j + L <= columns; j += L) store(target + j, load(source + j) * factor);
    if (j < columns) {
      const Vec<A> last = load_part(source + j, columns - j) * factor;
      store_part(target + j, last, smaller(L, to.stride - j));
      j += L;
    }
    for (; j < to.stride; ++j) target[j] = 0;
  }
  for (int64_t i = rows; i < to_rows; ++i)
    for (int64_t j = 0; j < to.stride; ++j) to.row(i)[j] = 0;
}

// A list of lane numbers, for shuffles, whose masks must be constants.
template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct LanesBelow : LanesBelow<n - 1, n - 1, lane...> {};
template <int... lane>
struct LanesBelow<0, lane...> {
  using type = Lanes<lane...>;
};

// Lane i of the result is element lane[i] of a and b in a row.
template <int... lane, class V>
inline V shuffle(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  const decltype(a < b) mask = {lane...};
  return __builtin_shuffle(a, b, mask);
#endif
}

// The 2×2 blocks of `half` × `half` elements in rows i and i + half change places off the diagonal.
template <int half, class V, int... lane>
inline void exchange(V& upper, V& lower, Lanes<lane...>) {
  constexpr int L = sizeof...(lane);
  const V left = shuffle<(lane & half ? L + lane - half : lane)...>(upper, lower);
  const V right = shuffle<(lane & half ? L + lane : lane + half)...>(upper, lower);
  upper = left;
  lower = right;
}

template <int half, class A>
inline void transpose_square(Vec<A> (&x)[lanes<A>()]) {
  if constexpr (half > 0) {
    for (int i = 0; i < lanes<A>(); ++i)
      if (!(i & half)) exchange<half>(x[i], x[i + half], typename LanesBelow<lanes<A>()>::type{});
    transpose_square<half / 2, A>(x);
  }
}

// to [columns][queries] = fromᵀ. Both are padded to whole vectors: `from` in its rows, `to` in the
// number of rows. Lanes beyond `queries` become zero.
template <class A>
inline void transpose(Rows<A> to, Rows<const A> from, int64_t queries, int64_t columns) {
  constexpr int L = lanes<A>();
  for (int64_t i = 0; i < queries; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      Vec<A> x[L];
      for (int l = 0; l < L; ++l) x[l] = i + l < queries ? load(from.row(i + l) + j) : Vec<A>{};
      transpose_square<L / 2, A>(x);
      for (int l = 0; l < L; ++l) store(to.row(j + l) + i, x[l]);
    }
}

// The same of numbers of any type, times a factor; `from` needs no padding.
template <class T, class A>
inline void pack_transposed(Rows<A> to, Rows<const T> from, int64_t queries, int64_t columns,
                            A factor) {
  constexpr int L = lanes<A>();
  for (int64_t i = 0; i < queries; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      Vec<A> x[L];
      for (int l = 0; l < L; ++l)
        x[l] = i + l < queries ? load_some(from.row(i + l) + j, columns - j) * factor : Vec<A>{};
      transpose_square<L / 2, A>(x);
      for (int l = 0; l < L; ++l) store(to.row(j + l) + i, x[l]);
    }
}

// Row i of `to` = factor[i] · column i of `from`, which is padded as `to` is above.
template <class T, class A>
inline void unpack_transposed(Rows<T> to, Rows<const A> from, int64_t queries, int64_t columns,
                              const A* factor) {
  constexpr int L = lanes<A>();
  for (int64_t i = 0; i < queries; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      Vec<A> x[L];
      for (int l = 0; l < L; ++l) x[l] = load(from.row(j + l) + i);
      transpose_square<L / 2, A>(x);
      for (int l = 0; l < L && i + l < queries; ++l) {
        const Vec<A> row = x[l] * factor[i + l];
        if (columns - j >= L)
          store(to.row(i + l) + j, row);
        else
          store_part(to.row(i + l) + j, row, columns - j);
      }
    }
}

}  // namespace GK_LEVEL
}  // namespace genkern
