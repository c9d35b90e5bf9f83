// The matrix products of the power method as sweeps over slabs (slabs.h); for kernel files.
//
//   gather    local ← W·summed     each slab gives its own elements
//   scatter   summed ← Wᵀ·local    each slab adds to all of them
//
// (W or its transpose, as the layout has it.) A gather followed by a scatter of what it gave is one
// sweep: a slab is still in cache from its gather when it scatters. That is what makes the order
// "local first" one read of W an iteration instead of two.
#pragma once

#include "../common/vec.h"
#include "slabs.h"
#include "vectors.h"

namespace genkern {
namespace GK_LEVEL {
namespace spectral {

// `slabs` row-major slabs at once, each a row of n elements. in: padded with zeros; sums: padded.
template <class T, int slabs, bool gather, bool scatter>
inline void sweep_rows(const T* w, int64_t n, const Acc<T>* in, Acc<T>* local, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int step = lanes<A>();
  if (gather) {
    Vec<A> dots[slabs][2] = {};
    int64_t j = 0;
    for (; j + 2 * step <= n; j += 2 * step) {
      for (int half = 0; half < 2; ++half) {
        const Vec<A> x = load(in + j + half * step);
        for (int r = 0; r < slabs; ++r) dots[r][half] += load(w + r * n + j + half * step) * x;
      }
    }
    for (; j < n; j += step) {
      const int64_t part = n - j < step ? n - j : step;
      const Vec<A> x = load(in + j);
      for (int r = 0; r < slabs; ++r) dots[r][0] += load_part(w + r * n + j, part) * x;
    }
    for (int r = 0; r < slabs; ++r) local[r] = sum(dots[r][0] + dots[r][1]);
  }
  if (scatter) {
    Vec<A> factors[slabs];
    for (int r = 0; r < slabs; ++r) factors[r] = splat(local[r]);
    int64_t j = 0;
    for (; j + step <= n; j += step) {
      Vec<A> x = load(sums + j);
      for (int r = 0; r < slabs; ++r) x += factors[r] * load(w + r * n + j);
      store(sums + j, x);
    }
    if (j < n) {
      Vec<A> x = load(sums + j);
      for (int r = 0; r < slabs; ++r) x += factors[r] * load_part(w + r * n + j, n - j);
      store(sums + j, x);
    }
  }
}

// One nested slab [rows, n].
template <class T, bool gather, bool scatter>
inline void sweep_nested(const T* w, int64_t rows, int64_t n, const Acc<T>* in, Acc<T>* local,
                         Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int step = lanes<A>();
  for (int64_t j = 0; j < n; j += step) {
    const int64_t part = n - j < step ? n - j : step;
    if (gather) {
      Vec<A> totals[4] = {};
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        for (int k = 0; k < 4; ++k) totals[k] += in[r + k] * load_part(w + (r + k) * n + j, part);
      for (; r < rows; ++r) totals[0] += in[r] * load_part(w + r * n + j, part);
      store_part(local + j, (totals[0] + totals[1]) + (totals[2] + totals[3]), part);
    }
    if (scatter) {
      const Vec<A> x = load_part(local + j, part);
      for (int64_t r = 0; r < rows; ++r) sums[r] += sum(load_part(w + r * n + j, part) * x);
    }
  }
}

// Slabs [begin, end) of the weight at w. `sums` are added to.
template <class T, bool gather, bool scatter>
void sweep(const Slabs& slabs, int64_t begin, int64_t end, const T* w, const Acc<T>* in,
           Acc<T>* local, Acc<T>* sums) {
  if (slabs.nested) {
    for (int64_t i = begin; i < end; ++i)
      sweep_nested<T, gather, scatter>(w + i * slabs.size(), slabs.rows, slabs.inner, in,
                                       local + i * slabs.inner, sums);
    return;
  }
  const int64_t n = slabs.inner;
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) sweep_rows<T, 4, gather, scatter>(w + i * n, n, in, local + i, sums);
  for (; i < end; ++i) sweep_rows<T, 1, gather, scatter>(w + i * n, n, in, local + i, sums);
}

}  // namespace spectral
}  // namespace GK_LEVEL
}  // namespace genkern
