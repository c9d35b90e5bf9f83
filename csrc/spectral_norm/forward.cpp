// Spectral normalization on the CPU, forward, for a whole list of weights in one call: power
// iterations, σ, and Ŵ = W/σ.
//
// Plan: an iteration that updates the local vector first (slabs.h; for weights normalised along
// dimension 0 that is torch's order, u first) is one sweep: each slab gathers its t = W v and,
// still in cache, scatters t into s = Wᵀ t; the norms are divided out afterwards: u = t/‖t‖, v =
// s/‖s‖, σ = ‖s‖/‖t‖. The other order takes a scatter, n - 1 such sweeps, and a gather. Then W/σ.
// Where eps would have clamped a norm, or a norm is so large or small that t and s lose digits, the
// layer is done again, literally (`by_definition`). A layer that fits in a core's cache is one task
// from beginning to end; a larger one is cut into tasks of slabs, each with its own s, added up in
// order. Floor, torch's order, one iteration: 2 reads and 1 write of W; in cache: 1 read and 1
// write.
#include <stdlib.h>
#include <string.h>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "spectral_norm.h"
#include "sweep.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

using namespace spectral;

template <class A>
double dot(const A* a, const A* b, int64_t n) {  // both padded with zeros
  Vec<A> totals[2] = {};
  for (int64_t i = 0; i < n; i += lanes<A>())
    totals[i / lanes<A>() % 2] += load(a + i) * load(b + i);
  return double(sum(totals[0] + totals[1]));
}
template <class A>
double norm(const A* x, int64_t n) {
  return __builtin_sqrt(dot(x, x, n));
}
template <class A>
void divide(A* x, int64_t n, double by) {
  const Vec<A> inverse = splat(A(1 / by));
  for (int64_t i = 0; i < n; i += lanes<A>()) store(x + i, load(x + i) * inverse);
}

// torch's F.normalize, for numbers of any size.
template <class A>
void normalize_carefully(A* x, int64_t n, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += double(x[i]) * double(x[i]);
  const double length = __builtin_sqrt(squares);
  const double by = length < eps ? eps : length;  // a NaN stays
  for (int64_t i = 0; i < n; ++i) x[i] = A(double(x[i]) / by);
}

// Norms outside this range square to what the sum type holds badly.
template <class A>
bool is_moderate(double norm) {
  constexpr double most = sizeof(A) == 4 ? 1e15 : 1e120;
  return norm > 1 / most && norm < most;
}

template <class T>
struct Layer {
  using A = Acc<T>;
  const SpectralForward* args;
  Slabs slabs;
  double eps;
  bool local_first;
  bool as_defined;  // no norm was clamped or immoderate so far
  A sigma;
  A *local, *spare;  // [locals], like all of these padded with zeros to whole vectors
  A* summed;         // [summed]
  A* sums;           // [summed] for each task

  const T* weight() const { return static_cast<const T*>(args->weight); }
  int64_t stride() const { return padded<A>(slabs.summed()); }
  int64_t bytes() const { return slabs.count * slabs.size() * int64_t(sizeof(T)); }
  int64_t scratch() const { return 2 * padded<A>(slabs.locals()) + (1 + slabs.tasks()) * stride(); }
  void take_scratch(A* from) {
    local = from;
    spare = local + padded<A>(slabs.locals());
    summed = spare + padded<A>(slabs.locals());
    sums = summed + stride();
  }

  void read_state() {
    A* u = slabs.u_is_local ? local : summed;
    A* v = slabs.u_is_local ? summed : local;
    for (int64_t i = slabs.locals(); i < padded<A>(slabs.locals()); ++i) local[i] = 0;
    for (int64_t i = slabs.summed(); i < padded<A>(slabs.summed()); ++i) summed[i] = 0;
    if (args->wide_state || sizeof(T) == sizeof(A))
      read_vectors(static_cast<const A*>(args->u), static_cast<const A*>(args->v), u, v);
    else
      read_vectors(static_cast<const T*>(args->u), static_cast<const T*>(args->v), u, v);
    for (int64_t i = slabs.locals(); i < padded<A>(slabs.locals()); ++i) spare[i] = 0;
  }
  template <class S>
  void read_vectors(const S* from_u, const S* from_v, A* u, A* v) const {
    convert(from_u, rows(), u);
    transpose(from_v, args->v_leading, cols(), v);
  }
  int64_t rows() const { return args->rows; }
  int64_t cols() const { return args->outer * args->inner; }

  // ---- Sweeps: how many, and which products each one holds ----
  int64_t sweeps() const {
    const int64_t n = args->iterations;
    return n == 0 ? 1 : local_first ? n : n + 1;
  }
  bool gathers(int64_t k) const { return args->iterations == 0 || local_first || k > 0; }
  bool scatters(int64_t k) const {
    return args->iterations > 0 && (local_first || k < args->iterations);
  }

  void run(int64_t k, int64_t task) {
    A* mine = sums + task * stride();
    A* gathered = args->iterations ? local : spare;  // without iterations `local` is to stay
    const int64_t begin = slabs.begin(task), end = slabs.end(task);
    if (scatters(k)) memset(mine, 0, size_t(stride()) * sizeof(A));
    if (gathers(k) && scatters(k))
      sweep<T, true, true>(slabs, begin, end, weight(), summed, gathered, mine);
    else if (gathers(k))
      sweep<T, true, false>(slabs, begin, end, weight(), summed, gathered, mine);
    else
      sweep<T, false, true>(slabs, begin, end, weight(), summed, gathered, mine);
  }

  // After all tasks of sweep k: the norms, σ, the next vectors; after the last sweep the results.
  void close(int64_t k) {
    const bool last = k + 1 == sweeps();
    if (args->iterations == 0) {
      sigma = A(dot(local, spare, slabs.locals()));
    } else {
      double of_local = 1;  // the norm of what the scatter was given
      if (gathers(k)) {
        of_local = norm(local, slabs.locals());
        check(of_local, of_local);
        if (last) divide(local, slabs.locals(), of_local);
        sigma = A(of_local);
      }
      if (scatters(k)) {
        add_up();
        const double of_summed = norm(summed, slabs.summed());
        check(of_summed, of_summed / of_local);
        divide(summed, slabs.summed(), of_summed);
        sigma = A(of_summed / of_local);
      }
    }
    if (last) {
      if (!as_defined) by_definition();
      write_results();
    }
  }
  void check(double computed, double defined) {
    as_defined = as_defined && is_moderate<A>(computed) && defined > eps;
  }
  void add_up() {
    for (int64_t j = 0; j < stride(); j += lanes<A>()) {
      Vec<A> total = load(sums + j);
      for (int64_t i = 1; i < slabs.tasks(); ++i) total += load(sums + i * stride() + j);
      store(summed + j, total);
    }
  }

  void by_definition() {
    read_state();
    for (int64_t i = 0; i < args->iterations; ++i) {
      if (local_first) gather_normalized();
      memset(sums, 0, size_t(stride()) * sizeof(A));
      sweep<T, false, true>(slabs, 0, slabs.count, weight(), summed, local, sums);
      memcpy(summed, sums, size_t(stride()) * sizeof(A));
      normalize_carefully(summed, slabs.summed(), eps);
      if (!local_first) gather_normalized();
    }
    sweep<T, true, false>(slabs, 0, slabs.count, weight(), summed, spare, sums);
    sigma = A(dot(local, spare, slabs.locals()));
  }
  void gather_normalized() {
    sweep<T, true, false>(slabs, 0, slabs.count, weight(), summed, local, sums);
    normalize_carefully(local, slabs.locals(), eps);
  }

  void write_results() const {
    *static_cast<A*>(args->sigma) = sigma;
    write_vectors(static_cast<A*>(args->new_u), static_cast<A*>(args->new_v));
    if (args->wide_state || sizeof(T) == sizeof(A))
      write_vectors(static_cast<A*>(args->store_u), static_cast<A*>(args->store_v));
    else
      write_vectors(static_cast<T*>(args->store_u), static_cast<T*>(args->store_v));
  }
  template <class S>
  void write_vectors(S* u, S* v) const {
    const A* own_u = slabs.u_is_local ? local : summed;
    const A* own_v = slabs.u_is_local ? summed : local;
    if (u) convert(own_u, rows(), u);
    if (v) transpose(own_v, cols() / args->v_leading, cols(), v);
  }

  void normalize(int64_t task) const {
    constexpr int step = lanes<A>();
    const Divisor<A> divide(sigma);
    const int64_t begin = slabs.begin(task) * slabs.size(), end = slabs.end(task) * slabs.size();
    T* out = static_cast<T*>(args->normalized);
    int64_t i = begin;
    for (; i + step <= end; i += step) store(out + i, divide(load(weight() + i)));
    if (i < end) store_part(out + i, divide(load_part(weight() + i, end - i)), end - i);
  }
};

template <class T>
Status forward(const SpectralForward* list, int64_t count, const SpectralOptions& options) {
  using A = Acc<T>;
  Layer<T>* layers = static_cast<Layer<T>*>(malloc(sizeof(Layer<T>) * size_t(count)));
  if (!layers) return Status::out_of_memory;
  int64_t parts = 0, elements = 0, scratch = 0, sweeps = 0;
  for (int64_t i = 0; i < count; ++i) {
    Layer<T>& layer = layers[i];
    layer.args = &list[i];
    layer.slabs = slabs_of(list[i].outer, list[i].rows, list[i].inner, sizeof(T));
    layer.eps = options.eps;
    layer.local_first = layer.slabs.u_is_local == (options.order == UpdateOrder::u_first);
    layer.as_defined = true;
    parts += layer.slabs.tasks();
    elements += layer.slabs.count * layer.slabs.size();
    scratch += layer.scratch();
    if (layer.slabs.tasks() > 1 && layer.sweeps() > sweeps) sweeps = layer.sweeps();
  }
  A* numbers = static_cast<A*>(allocate_scratch(scratch * int64_t(sizeof(A))));
  Task* tasks = static_cast<Task*>(malloc(sizeof(Task) * size_t(parts + count)));
  if (!numbers || !tasks) {
    free(layers), free(numbers), free(tasks);
    return Status::out_of_memory;
  }
  int64_t used = 0;
  for (int64_t i = 0; i < count; ++i) {
    layers[i].take_scratch(numbers + used);
    used += layers[i].scratch();
  }

  // Behind the tasks: the layers that were cut.
  const int64_t cut = order_tasks(layers, count, tasks);
  int64_t cut_layers = 0;
  for (int64_t i = 0; i < cut; ++i)
    if (tasks[i].part == 0) tasks[parts + cut_layers++] = tasks[i];

  const int team = elements < parallel_from ? 1 : options.threads;
  parallel(cut_layers, team, [&](int64_t i, int) { layers[tasks[parts + i].layer].read_state(); });
  for (int64_t k = 0; k == 0 || k < sweeps; ++k) {
    parallel(k == 0 ? parts : cut, team, [&](int64_t i, int) {
      Layer<T>& layer = layers[tasks[i].layer];
      if (i < cut) {
        if (k < layer.sweeps()) layer.run(k, tasks[i].part);
        return;
      }
      layer.read_state();
      for (int64_t own = 0; own < layer.sweeps(); ++own) {
        layer.run(own, 0);
        layer.close(own);
      }
      layer.normalize(0);
    });
    parallel(cut_layers, team, [&](int64_t i, int) {
      Layer<T>& layer = layers[tasks[parts + i].layer];
      if (k < layer.sweeps()) layer.close(k);
    });
  }
  // Backwards: what was read last is still in cache.
  parallel(cut, team, [&](int64_t i, int) {
    const Task& task = tasks[cut - 1 - i];
    layers[task.layer].normalize(task.part);
  });
  free(layers), free(numbers), free(tasks);
  return Status::ok;
}

}  // namespace

Status spectral_norm_forward(const SpectralForward* list, int64_t count,
                             const SpectralOptions& options) {
  return for_dtype(options.dtype,
                   [&](auto t) { return forward<decltype(t)>(list, count, options); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
