// Gradients of spectral normalization on the CPU, for a whole list of weights in one call:
//
//   dW = dŴ/σ + (dσ - ⟨dŴ, Ŵ⟩/σ) u vᵀ
//
// Plan: ⟨dŴ, Ŵ⟩ needs all of a weight before any of dW can be written, so there are two passes. A
// weight that fits in a core's cache is one task that does both; a larger one is cut into tasks of
// slabs (slabs.h), first all their inner products, then all their dW. An inner product is summed
// in the sum type over runs of 4096 elements, in double over runs and tasks, in a fixed order.
// Floor: 3 reads and 1 write of the weights, 2 reads and 1 write where they stay in cache.
#include <stdlib.h>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/vec.h"
#include "slabs.h"
#include "spectral_norm.h"
#include "vectors.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

using namespace spectral;

constexpr int64_t run = 4096;

template <class T>
double inner_product(const T* a, const T* b, int64_t n) {
  using A = Acc<T>;
  constexpr int step = lanes<A>();
  double total = 0;
  for (int64_t at = 0; at < n; at += run) {
    const int64_t end = n - at < run ? n : at + run;
    Vec<A> sums[4] = {};
    int64_t i = at;
    for (; i + 4 * step <= end; i += 4 * step)
      for (int k = 0; k < 4; ++k) sums[k] += load(a + i + k * step) * load(b + i + k * step);
    for (; i < end; i += step) {
      const int64_t part = end - i < step ? end - i : step;
      sums[0] += load_part(a + i, part) * load_part(b + i, part);
    }
    total += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

// out = g/σ + factor · v, one row of the matrix; g null means zero. A last vector that the row
// fills in part is written whole where `room` elements allow it: the next row comes after.
template <class T>
void write_row(const T* g, const Acc<T>* v, int64_t n, int64_t room, const Divisor<Acc<T>>& divide,
               Acc<T> factor, T* out) {
  using A = Acc<T>;
  constexpr int step = lanes<A>();
  int64_t j = 0;
  for (; j + step <= n; j += step)
    store(out + j, (g ? divide(load(g + j)) : Vec<A>{}) + factor * load(v + j));
  if (j < n) {
    const Vec<A> along = factor * load_part(v + j, n - j);
    if (j + step <= room)
      store(out + j, (g ? divide(load(g + j)) : Vec<A>{}) + along);
    else
      store_part(out + j, (g ? divide(load_part(g + j, n - j)) : Vec<A>{}) + along, n - j);
  }
}

template <class T>
struct Layer {
  using A = Acc<T>;
  const SpectralBackward* args;
  Slabs slabs;
  double* products;  // one a task
  const A* v;        // in the order of memory

  const T* grad() const { return static_cast<const T*>(args->grad_normalized); }

  void multiply(int64_t task) const {
    const int64_t from = slabs.begin(task) * slabs.size(), to = slabs.end(task) * slabs.size();
    const T* normalized = static_cast<const T*>(args->normalized);
    products[task] = grad() ? inner_product(grad() + from, normalized + from, to - from) : 0;
  }

  void write(int64_t task) const {
    double product = 0;
    for (int64_t i = 0; i < slabs.tasks(); ++i) product += products[i];
    const A sigma = *static_cast<const A*>(args->sigma);
    const A* grad_sigma = static_cast<const A*>(args->grad_sigma);
    const A along = grad() ? A(product / double(sigma)) : A(0);
    const A factor = (grad_sigma ? *grad_sigma : A(0)) - along;
    const Divisor<A> divide(sigma);
    const A* u = static_cast<const A*>(args->u);
    const A* local = slabs.u_is_local ? u : v;
    const A* summed = slabs.u_is_local ? v : u;
    T* out = static_cast<T*>(args->grad_weight);
    for (int64_t slab = slabs.begin(task); slab < slabs.end(task); ++slab) {
      for (int64_t row = 0; row < slabs.rows; ++row) {
        const int64_t at = slab * slabs.size() + row * slabs.inner;
        const A* vector = slabs.nested ? local + slab * slabs.inner : summed;
        const A number = slabs.nested ? summed[row] : local[slab];
        const int64_t room = slabs.end(task) * slabs.size() - at;
        write_row(grad() ? grad() + at : nullptr, vector, slabs.inner, room, divide,
                  factor * number, out + at);
      }
    }
  }
};

template <class T>
Status backward(const SpectralBackward* list, int64_t count, int threads) {
  using A = Acc<T>;
  Layer<T>* layers = static_cast<Layer<T>*>(malloc(sizeof(Layer<T>) * size_t(count)));
  if (!layers) return Status::out_of_memory;
  int64_t parts = 0, elements = 0, turned = 0;
  for (int64_t i = 0; i < count; ++i) {
    const SpectralBackward& args = list[i];
    const Slabs slabs = slabs_of(args.outer, args.rows, args.inner, sizeof(T));
    layers[i] = {&args, slabs, nullptr, static_cast<const A*>(args.v)};
    if (args.v_leading > 1) turned += args.outer * args.inner;
    parts += slabs.tasks();
    elements += slabs.count * slabs.size();
  }
  double* products = static_cast<double*>(malloc(sizeof(double) * size_t(parts)));
  Task* tasks = static_cast<Task*>(malloc(sizeof(Task) * size_t(parts)));
  A* vectors = static_cast<A*>(allocate_scratch(turned * int64_t(sizeof(A))));
  if (!products || !tasks || !vectors) {
    free(layers), free(products), free(tasks), free(vectors);
    return Status::out_of_memory;
  }

  const int64_t cut = order_tasks(layers, count, tasks);
  for (int64_t i = 0, used = 0; i < count; used += layers[i++].slabs.tasks())
    layers[i].products = products + used;
  for (int64_t i = 0, used = 0; i < count; ++i) {
    const int64_t leading = list[i].v_leading, cols = list[i].outer * list[i].inner;
    if (leading == 1) continue;
    transpose(layers[i].v, leading, cols, vectors + used);
    layers[i].v = vectors + used;
    used += cols;
  }

  const int team = elements < parallel_from ? 1 : threads;
  parallel(parts, team, [&](int64_t i, int) {
    const Layer<T>& layer = layers[tasks[i].layer];
    layer.multiply(tasks[i].part);
    if (i >= cut) layer.write(tasks[i].part);
  });
  // Backwards: what was read last is still in cache.
  parallel(cut, team, [&](int64_t i, int) {
    const Task& task = tasks[cut - 1 - i];
    layers[task.layer].write(task.part);
  });
  free(layers), free(products), free(tasks), free(vectors);
  return Status::ok;
}

}  // namespace

Status spectral_norm_backward(const SpectralBackward* list, int64_t count,
                              const SpectralOptions& options) {
  return for_dtype(options.dtype,
                   [&](auto t) { return backward<decltype(t)>(list, count, options.threads); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
