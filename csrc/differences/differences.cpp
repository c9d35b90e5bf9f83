// Mean differences of pairs on the CPU: value and gradients in one pass over both tensors.
//
// Layout: every tensor is a flat array; a pair is cut into chunks (common/chunks.h), a task is one
// chunk of one pair. Plan of a task: read lanes of a and b once, d = a - b, sum φ(d), write
// ±φ'(d)·scale where wanted (in fp32, rounded once); leave the chunk's sum in a table, which one
// thread adds up in order, in double. Floor: one read of a and b, one write of each gradient that
// is wanted: memory's speed.
#include "differences.h"

#include "../common/chunks.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

struct Absolute {
  template <class A>
  static Vec<A> value(Vec<A> d) {
    return select(d < A(0), -d, d);
  }
  template <class A>
  static Vec<A> slope(Vec<A> d) {  // 0 at 0 and, as in PyTorch, at NaN
    return select(d > A(0), splat(A(1)), select(d < A(0), splat(A(-1)), splat(A(0))));
  }
};
struct Square {
  template <class A>
  static Vec<A> value(Vec<A> d) {
    return d * d;
  }
  template <class A>
  static Vec<A> slope(Vec<A> d) {
    return d + d;
  }
};

// Σ φ(a - b) over n elements; gradients `scale` · φ' where wanted.
template <class T, class F, bool values>
double one_chunk(const T* a, const T* b, int64_t n, double scale, T* grad_a, T* grad_b) {
  using A = Acc<T>;
  constexpr int run = 32;  // vectors that one fp32 sum may take before it moves on to a double
  const A factor = A(scale);
  double total = 0;
  Vec<A> part{};
  int added = 0;
  for (int64_t i = 0; i < n; i += lanes<A>()) {
    // The lanes behind the end are zeros in both, whose difference adds nothing.
    const Vec<A> d = load_some(a + i, n - i) - load_some(b + i, n - i);
    if (values) {
      part += F::template value<A>(d);
      if (++added == run) {
        total += double(sum(part));
        part = Vec<A>{};
        added = 0;
      }
    }
    if (!grad_a && !grad_b) continue;
    const Vec<A> gradient = F::template slope<A>(d) * factor;
    if (grad_a) store_some(grad_a + i, gradient, n - i);
    if (grad_b) store_some(grad_b + i, -gradient, n - i);
  }
  return total + double(sum(part));
}

int64_t tasks_of(const DifferencePair* pairs, int64_t count) {
  int64_t tasks = 0;
  for (int64_t p = 0; p < count; ++p) tasks += chunks_of(pairs[p].count);
  return tasks;
}

// Every chunk of every pair; its sum to table[task].
template <class T, class F, bool values>
void sweep(const DifferencePair* pairs, int64_t count, double upstream, double* table,
           int most_threads) {
  int64_t elements = 0;
  for (int64_t p = 0; p < count; ++p) elements += pairs[p].count;
  const int threads = elements < parallel_from / 2 ? 1 : most_threads;
  parallel(tasks_of(pairs, count), threads, [&](int64_t task, int) {
    int64_t p = 0, first = 0;
    while (task - first >= chunks_of(pairs[p].count)) first += chunks_of(pairs[p++].count);
    const DifferencePair& pair = pairs[p];
    const int64_t chunk = chunk_size(pair.count), at = (task - first) * chunk;
    const int64_t n = pair.count - at < chunk ? pair.count - at : chunk;
    T* grad_a = static_cast<T*>(pair.grad_a);
    T* grad_b = static_cast<T*>(pair.grad_b);
    const double sum_of_chunk = one_chunk<T, F, values>(
        static_cast<const T*>(pair.a) + at, static_cast<const T*>(pair.b) + at, n,
        upstream * pair.weight / double(pair.count), grad_a ? grad_a + at : nullptr,
        grad_b ? grad_b + at : nullptr);
    if (values) table[task] = sum_of_chunk;
  });
}

template <class T>
Status forward(const DifferencesForward& args) {
  const DifferencePair* pairs = args.pairs;
  const int64_t bytes = tasks_of(pairs, args.count) * int64_t(sizeof(double));
  double* table = static_cast<double*>(allocate_scratch(bytes));
  if (!table) return Status::out_of_memory;
  if (args.distance == Distance::absolute)
    sweep<T, Absolute, true>(pairs, args.count, 1, table, args.threads);
  else
    sweep<T, Square, true>(pairs, args.count, 1, table, args.threads);
  double loss = 0;
  const double* next = table;
  for (int64_t p = 0; p < args.count; ++p) {
    double total = 0;
    for (const double* end = next + chunks_of(pairs[p].count); next < end; ++next) total += *next;
    loss += pairs[p].weight * (total / double(pairs[p].count));  // over nothing NaN, as in PyTorch
  }
  free(table);
  *static_cast<Acc<T>*>(args.loss) = Acc<T>(loss);
  return Status::ok;
}

template <class T>
Status backward(const DifferencesBackward& args) {
  const double upstream = double(*static_cast<const Acc<T>*>(args.grad_loss));
  if (args.distance == Distance::absolute)
    sweep<T, Absolute, false>(args.pairs, args.count, upstream, nullptr, args.threads);
  else
    sweep<T, Square, false>(args.pairs, args.count, upstream, nullptr, args.threads);
  return Status::ok;
}

}  // namespace

Status differences_forward(const DifferencesForward& args) {
  return for_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args); });
}

Status differences_backward(const DifferencesBackward& args) {
  return for_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
