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
      Vec<A> x = factors[0] * load(w + j);
      for (int r = 1; r < slabs; ++r) x += factors[r] * load(w + r * n + j);
      store(sums + j, load(sums + j) + x);
    }
    if (j < n) {
      Vec<A> x = factors[0] * load_part(w + j, n - j);
      for (int r = 1; r < slabs; ++r) x += factors[r] * load_part(w + r * n + j, n - j);
      store(sums + j, load(sums + j) + x);
    }
  }
}

// A vector at `from`, of which the first n lanes are wanted: all are read where memory up to `end`
// allows it, which is much faster.
template <class T>
inline Vec<Acc<T>> load_first(const T* from, int64_t n, const T* end) {
  return end - from >= lanes<Acc<T>>() ? load(from) : load_part(from, n);
}

// The gather of one nested slab [rows, n]; `end` of the weight.
template <class T>
inline void gather_nested(const T* w, int64_t rows, int64_t n, const T* end, const Acc<T>* in,
                          Acc<T>* local) {
  using A = Acc<T>;
  constexpr int step = lanes<A>();
  for (int64_t j = 0; j < n; j += step) {
    const int64_t part = n - j < step ? n - j : step;
    Vec<A> totals[4] = {};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      for (int k = 0; k < 4; ++k)
        totals[k] += in[r + k] * load_first(w + (r + k) * n + j, part, end);
    for (; r < rows; ++r) totals[0] += in[r] * load_first(w + r * n + j, part, end);
    const Vec<A> total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    if (part == step)
      store(local + j, total);
    else
      store_part(local + j, total, part);
  }
}

// The scatter of `count` nested slabs into the sums of `group` rows, the first at w: a sum across a
// vector's lanes costs as much as many products, so it comes last.
template <class T, int group>
inline void scatter_nested(const T* w, int64_t count, int64_t size, int64_t n, const T* end,
                           const Acc<T>* local, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int step = lanes<A>();
  Vec<A> totals[group] = {};
  for (int64_t i = 0; i < count; ++i, w += size, local += n) {
    for (int64_t j = 0; j < n; j += step) {
      const int64_t part = n - j < step ? n - j : step;
      const Mask<A> wanted = first_lanes<A>(part);
      const Vec<A> x = part == step ? load(local + j) : load_part(local + j, part);
      for (int k = 0; k < group; ++k) {
        const Vec<A> product = load_first(w + k * n + j, part, end) * x;
        totals[k] += part == step ? product : select(wanted, product, Vec<A>{});
      }
    }
  }
  for (int k = 0; k < group; ++k) sums[k] += sum(totals[k]);
}

// Slabs [begin, end) of the weight at w. `sums` are added to.
template <class T, bool gather, bool scatter>
void sweep(const Slabs& slabs, int64_t begin, int64_t end, const T* w, const Acc<T>* in,
           Acc<T>* local, Acc<T>* sums) {
  const int64_t size = slabs.size(), rows = slabs.rows, n = slabs.inner;
  if (slabs.nested) {
    const T* all = w + slabs.count * size;
    if (gather)
      for (int64_t i = begin; i < end; ++i)
        gather_nested(w + i * size, rows, n, all, in, local + i * n);
    if (scatter) {
      constexpr int group = 8;
      const T* first = w + begin * size;
      const Acc<T>* own = local + begin * n;
      int64_t r = 0;
      for (; r + group <= rows; r += group)
        scatter_nested<T, group>(first + r * n, end - begin, size, n, all, own, sums + r);
      for (; r < rows; ++r)
        scatter_nested<T, 1>(first + r * n, end - begin, size, n, all, own, sums + r);
    }
    return;
  }
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) sweep_rows<T, 4, gather, scatter>(w + i * n, n, in, local + i, sums);
  for (; i < end; ++i) sweep_rows<T, 1, gather, scatter>(w + i * n, n, in, local + i, sums);
}

}  // namespace spectral
}  // namespace GK_LEVEL
}  // namespace genkern
