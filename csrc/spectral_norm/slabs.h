// How both passes of spectral normalization see a weight and cut it into tasks; for kernel files.
//
// A weight is a row of slabs, contiguous one after the other, and each of the matrix's two vectors
// plays one part: of the "local" one every slab has elements of its own, the "summed" one belongs
// to all slabs. With them each product is a sweep over slabs:
//
//   row-major       a slab is one row (inner elements)     local: one element   summed: inner
//   nested          a slab is a matrix [rows, inner]       local: inner         summed: rows
//
// Row-major are weights normalised along dimension 0 (local = u) or along the last (local = v),
// nested those along a dimension between.
#pragma once

#include <stdint.h>

#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {
namespace spectral {

struct Slabs {
  bool nested, u_is_local;
  int64_t count, rows, inner;  // rows is 1 where row-major
  int64_t per_task;            // slabs

  int64_t size() const { return rows * inner; }
  int64_t local() const { return nested ? inner : 1; }
  int64_t locals() const { return count * local(); }
  int64_t summed() const { return nested ? rows : inner; }
  int64_t tasks() const { return count <= per_task ? 1 : (count + per_task - 1) / per_task; }
  int64_t begin(int64_t task) const { return task * per_task; }
  int64_t end(int64_t task) const {
    return (task + 1) * per_task < count ? (task + 1) * per_task : count;
  }
};

// A layer up to this size is one task, so that a core reads it from memory once and then from its
// cache. The cut must not depend on the number of threads: partial sums follow it.
constexpr int64_t whole_bytes = 768 << 10;
constexpr int64_t task_bytes = 512 << 10;
constexpr int64_t task_slabs = 64;  // fewer, and the tasks' sums would be traffic to speak of

inline Slabs slabs_of(int64_t outer, int64_t rows, int64_t inner, int64_t element_bytes) {
  Slabs s;
  if (outer == 1)
    s = {false, true, rows, 1, inner, 0};
  else if (inner == 1)
    s = {false, false, outer, 1, rows, 0};
  else
    s = {true, false, outer, rows, inner, 0};
  const int64_t slab_bytes = s.size() * element_bytes;
  if (slab_bytes * s.count <= whole_bytes) {
    s.per_task = s.count;
  } else {
    const int64_t even = (task_bytes / slab_bytes + 3) / 4 * 4;
    s.per_task = s.nested || even > task_slabs ? (even > 0 ? even : 1) : task_slabs;
  }
  return s;
}

struct Task {
  int64_t layer, part;
};

// All tasks of all layers: the parts of the large ones first, then, from the returned position on,
// the layers that are one task, to fill up the threads' time.
template <class Layer>
inline int64_t order_tasks(const Layer* layers, int64_t count, Task* tasks) {
  int64_t at = 0, cut = 0;
  for (int whole = 0; whole < 2; ++whole) {
    if (whole) cut = at;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t parts = layers[i].slabs.tasks();
      if ((parts == 1) != (whole == 1)) continue;
      for (int64_t part = 0; part < parts; ++part) tasks[at++] = {i, part};
    }
  }
  return cut;
}

// x / σ by a product with 1/σ where that is exact enough.
template <class A>
struct Divisor {
  A sigma, inverse;
  bool by_product;

  explicit Divisor(A by) : sigma(by), inverse(A(1) / by) {
    constexpr A least = sizeof(A) == 4 ? A(0x1p-100) : A(0x1p-1000);
    const A magnitude = by < 0 ? -by : by;
    by_product = magnitude > least && magnitude < A(1) / least;
  }
  Vec<A> operator()(Vec<A> x) const { return by_product ? x * inverse : x / sigma; }
};

}  // namespace spectral
}  // namespace GK_LEVEL
}  // namespace genkern
