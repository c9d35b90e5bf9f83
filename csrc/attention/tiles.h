// The vocabulary of every attention pass: tile products, packing, scratch. For kernel files.
//
// Orientation: keys in rows, queries in lanes. A query block is up to 3 vectors wide, and logits
// live as Sᵀ [keys][queries], so that softmax needs no horizontal reduction. Everything a pass
// multiplies is then one shape of product,
//
//   C[r, :] (+)= Σ_c left(r, c) · B[c, :]        left broadcast element by element, B in vectors
//
//   Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ        left = rows of K, V         B = packed queries
//   Oᵀ += Vᵀ·Pᵀ, dQᵀ += Kᵀ·dSᵀ    left = columns of V, K      B = Pᵀ, dSᵀ
//   dV += Pᵀ·dO, dK += dSᵀ·Q      left = rows of Pᵀ, dSᵀ      B = dO, Q as they are
//
// K and V are read where they lie if they are compact and of the arithmetic type; anything else
// (half precision, strides, ragged ends) is packed a block at a time: converted, rows and columns
// padded with zeros to multiples of `step`.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../common/scratch.h"
#include "../common/vec.h"
#include "attention.h"

namespace genkern {
namespace GK_LEVEL {

// Rows of C held in registers: `step` × `max_vectors` accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int step = 8;
#else
constexpr int step = 4;
#endif
constexpr int max_vectors = 3;

template <class A>
constexpr int64_t query_block = max_vectors * lanes<A>();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a < b ? b : a; }

template <class A>
inline int64_t vectors_for(int64_t n) {
  return ceil_div(n, lanes<A>());
}

// A row-major matrix inside scratch or a tensor.
template <class A>
struct Rows {
  A* data;
  int64_t stride;
  A* row(int64_t i) const { return data + i * stride; }
};

template <class A>
inline void clear(Rows<A> to, int64_t rows) {
  memset(to.data, 0, size_t(rows * to.stride) * sizeof(A));
}

// One head of a tensor.
template <class T>
inline Rows<T> head_of(const Heads& tensor, int64_t batch, int64_t head) {
  return {static_cast<T*>(tensor.data) + batch * tensor.batch + head * tensor.head, tensor.row};
}

// ---- Products -----------------------------------------------------------------------------------

enum class Left { rows, columns };  // left(r, c) is a.row(r)[c] or a.row(c)[r]
enum class Into { fresh, sum };

template <Left left, Into into, int vectors, class A>
inline void product_panel(Rows<A> c, Rows<const A> a, Rows<const A> b, int64_t rows,
                          int64_t depth) {
  constexpr int L = lanes<A>();
  for (int64_t r = 0; r < rows; r += step) {
    Vec<A> sum[step][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i)
#pragma GCC unroll 3
      for (int w = 0; w < vectors; ++w) sum[i][w] = Vec<A>{};
    const A* at = left == Left::rows ? a.row(r) : a.data + r;
    const int64_t next_row = left == Left::rows ? a.stride : 1;
    const int64_t next_column = left == Left::rows ? 1 : a.stride;
    const A* from = b.data;
    for (int64_t k = 0; k < depth; ++k, at += next_column, from += b.stride) {
      Vec<A> x[vectors];
#pragma GCC unroll 3
      for (int w = 0; w < vectors; ++w) x[w] = load(from + w * L);
#pragma GCC unroll 8
      for (int i = 0; i < step; ++i)
#pragma GCC unroll 3
        for (int w = 0; w < vectors; ++w) sum[i][w] += x[w] * at[i * next_row];
    }
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i)
#pragma GCC unroll 3
      for (int w = 0; w < vectors; ++w) {
        // Added last: a block's sum is small beside the running one, and keeps more digits so.
        if (into == Into::sum) sum[i][w] += load(c.row(r + i) + w * L);
        store(c.row(r + i) + w * L, sum[i][w]);
      }
  }
}

// `rows` counts padding: it is rounded up to a multiple of `step`, and so much must lie in memory.
template <Left left, Into into, class A>
inline void product(Rows<A> c, Rows<const A> a, Rows<const A> b, int64_t rows, int64_t vectors,
                    int64_t depth) {
  while (vectors > 0) {
    const int64_t now = vectors == 4 ? 2 : smaller(vectors, max_vectors);
    if (now == 3)
      product_panel<left, into, 3>(c, a, b, rows, depth);
    else if (now == 2)
      product_panel<left, into, 2>(c, a, b, rows, depth);
    else
      product_panel<left, into, 1>(c, a, b, rows, depth);
    c.data += now * lanes<A>();
    b.data += now * lanes<A>();
    vectors -= now;
  }
}

// ---- Packing ------------------------------------------------------------------------------------

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

// Rows [first, first + count) of a head, as `left` of a product: in place where possible.
template <class T, class A>
inline Rows<const A> left_operand(Rows<const T> head, int64_t first, int64_t count, int64_t columns,
                                  Rows<A> scratch) {
  const Rows<const T> from{head.row(first), head.stride};
  if constexpr (sizeof(T) == sizeof(A)) {
    if (head.stride == columns && columns % step == 0 && count % step == 0) return from;
  }
  pack<T, A>(scratch, from, count, columns, round_up(count, step), A(1));
  return {scratch.data, scratch.stride};
}

// ---- Scale and softmax --------------------------------------------------------------------------

// scale = sign · magnitude. The sign goes into the packed queries, which stays exact; the magnitude
// multiplies S - shift inside exp's argument. In this order the largest P is exactly 1.
template <class A>
struct Scale {
  A sign, magnitude;

  explicit Scale(double scale)
      : sign(A(scale) > 0   ? 1
             : A(scale) < 0 ? -1
                            : 0),
        magnitude(A(scale) == 0  ? A(1)
                  : A(scale) < 0 ? A(-scale)
                                 : A(scale)) {}
};

// Where a row's numbers lie in a SoftmaxRows.
template <class A>
inline A* row_numbers(void* all, const AttentionShape& shape, int64_t batch, int64_t head,
                      int64_t i0) {
  return static_cast<A*>(all) + (batch * shape.H + head) * shape.N + i0;
}

// ---- Causal masks -------------------------------------------------------------------------------

// Keys that a query block [i0, i0 + queries) can see.
inline int64_t visible_keys(const AttentionShape& shape, int64_t i0, int64_t queries) {
  return shape.is_causal ? smaller(shape.M, i0 + queries) : shape.M;
}

// s[j, i] = value where key j0 + j is beyond query i0 + i.
template <class A>
inline void hide_future(Rows<A> s, int64_t i0, int64_t j0, int64_t keys, int64_t vectors, A value) {
  constexpr int L = lanes<A>();
  for (int64_t j = i0 < j0 ? 0 : i0 - j0 + 1; j < keys; ++j)
    for (int64_t w = 0; w < vectors; ++w) {
      A* at = s.row(j) + w * L;
      const Mask<A> hidden = first_lanes<A>(j0 + j - i0 - w * L);
      store(at, select(hidden, splat(value), load(at)));
    }
}

// ---- Scratch ------------------------------------------------------------------------------------

// Hands out aligned pieces of one allocation; with no base it only counts what will be needed.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class A>
  A* array(int64_t count) {
    A* at = base ? reinterpret_cast<A*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(A)), scratch_alignment);
    return at;
  }
  template <class A>
  Rows<A> rows(int64_t count, int64_t stride) {
    return {array<A>(count * stride), stride};
  }
};

}  // namespace GK_LEVEL
}  // namespace genkern
