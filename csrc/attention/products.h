// The product of every attention pass on fused multiply-adds, and matrices in memory. For kernel
// files.
//
//   C[r, :] (+)= Σ_c left(r, c) · B[c, :]        left broadcast element by element, B in vectors
//
// C is held in registers, `step` rows by up to `max_vectors` vectors at a time.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../common/scratch.h"
#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {

// Rows of C held in registers: `step` × `max_vectors` accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int step = 8;
#else
constexpr int step = 4;
#endif
constexpr int max_vectors = 3;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
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
  Rows from(int64_t i) const { return {row(i), stride}; }
};

template <class A>
inline void clear(Rows<A> to, int64_t rows) {
  memset(to.data, 0, size_t(rows * to.stride) * sizeof(A));
}

template <class A>
inline Rows<const A> constant(Rows<A> rows) {
  return {rows.data, rows.stride};
}

// ---- Scratch ------------------------------------------------------------------------------------

// Hands out aligned pieces of one allocation; with no base it only counts what will be needed.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class A>
  A* array(int64_t count) {
    A* at = base ? reinterpret_cast<A*>(base + used) : nullptr;
    const int64_t end = used + count * int64_t(sizeof(A));
    used = round_up(end, scratch_alignment) + scratch_gap;
    if (base) forbid(base + end, used - end);
    return at;
  }
  template <class A>
  Rows<A> rows(int64_t count, int64_t stride) {
    return {array<A>(count * stride), stride};
  }
};

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

}  // namespace GK_LEVEL
}  // namespace genkern
