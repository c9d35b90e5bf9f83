// Norms of samples on the CPU: one read forward, one read and one write backward.
//
// Layout: a sample is a row that is cut into pieces (common/pieces.h). Plan: every task leaves the
// sum of squares of each of its pieces in a table, in double; afterwards one thread adds up the
// pieces of a sample in order, and the function of the sums is a loop over samples. Backward, one
// thread makes the samples' factors, then the same tasks multiply. The floor is the traffic: at 20
// GB/s 5 ms for 100 MB.
#include "sample_norms.h"

#include <math.h>

#include "../common/parallel.h"
#include "../common/pieces.h"
#include "../common/scratch.h"
#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

Cut cut_of_item(const SampleItem& item) { return cut_of(item.samples, item.size); }

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int step = lanes<A>(), chains = 4, run = 16;
  double total = 0;
  int64_t i = 0;
  while (n - i >= chains * step) {
    Vec<A> sums[chains] = {};
    for (int r = 0; r < run && n - i >= chains * step; ++r, i += chains * step)
      for (int c = 0; c < chains; ++c) {
        const Vec<A> v = load(x + i + c * step);
        sums[c] += v * v;
      }
    const Vec<A> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < step; ++lane) total += double(all[lane]);
  }
  Vec<A> rest{};
  for (; i < n; i += step) {
    const Vec<A> v = n - i >= step ? load(x + i) : load_part(x + i, n - i);
    rest += v * v;
  }
  for (int lane = 0; lane < step; ++lane) total += double(rest[lane]);
  return total;
}

template <class T>
void multiply(const T* x, int64_t n, Acc<T> factor, T* to) {
  constexpr int step = lanes<Acc<T>>();
  int64_t i = 0;
  for (; n - i >= step; i += step) store(to + i, load(x + i) * factor);
  if (i < n) store_part(to + i, load_part(x + i, n - i) * factor, n - i);
}

// body(item, cut, sample, part, place) for every piece of every item, in tasks; `place`
// counts the pieces.
template <class Body>
void each_piece(const SampleNorms& args, const Body& body) {
  int64_t tasks = 0, numbers = 0;
  for (int64_t i = 0; i < args.item_count; ++i) {
    tasks += cut_of_item(args.items[i]).tasks;
    numbers += args.items[i].samples * args.items[i].size;
  }
  const int team = numbers < parallel_from ? 1 : args.threads;
  parallel(tasks, team, [&](int64_t task, int) {
    int64_t which = 0, first_piece = 0;
    Cut cut = cut_of_item(args.items[0]);
    while (task >= cut.tasks) {
      task -= cut.tasks;
      first_piece += cut.pieces * args.items[which].samples;
      cut = cut_of_item(args.items[++which]);
    }
    const SampleItem& item = args.items[which];
    cut.in_task(task, [&](int64_t sample, int64_t part) {
      body(item, cut, sample, part, first_piece + sample * cut.pieces + part);
    });
  });
}

double largest_of(const double* sums, int64_t count) {
  double largest = sums[0];
  for (int64_t i = 1; i < count; ++i)
    if (!(sums[i] <= largest)) largest = largest != largest ? largest : sums[i];
  return largest;
}

double value_of(const SampleNorms& args, const SampleGroup& group) {
  const double* s = args.sums + group.first;
  if (args.function == SampleFunction::largest) return largest_of(s, group.samples);
  double total = 0;
  for (int64_t i = 0; i < group.samples; ++i) {
    if (args.function == SampleFunction::square) {
      total += s[i];
      continue;
    }
    const double beyond = sqrt(s[i]) - args.center;
    if (args.function == SampleFunction::distance || !(beyond <= 0)) total += beyond * beyond;
  }
  return total / double(group.samples);
}

// d value / d s_i times 2, since d s_i / d x = 2 x.
void factors_of(const SampleNorms& args, const SampleGroup& group, double upstream,
                double* factors) {
  const double* s = args.sums + group.first;
  double* to = factors + group.first;
  if (args.function == SampleFunction::largest) {
    const double largest = largest_of(s, group.samples);
    int64_t ties = 0;
    for (int64_t i = 0; i < group.samples; ++i) ties += s[i] == largest;
    for (int64_t i = 0; i < group.samples; ++i)
      to[i] = double(s[i] == largest) * (2 * upstream / double(ties));
    return;
  }
  const double each = 2 * upstream / double(group.samples);
  for (int64_t i = 0; i < group.samples; ++i) {
    if (args.function == SampleFunction::square) {
      to[i] = each;
      continue;
    }
    const double root = sqrt(s[i]), beyond = root - args.center;
    const bool flat = root == 0 || (args.function == SampleFunction::excess && beyond <= 0);
    to[i] = flat ? 0 : each * (beyond / root);
  }
}

template <class T>
Status forward(const SampleNorms& args, void* value) {
  using A = Acc<T>;
  int64_t pieces = 0;
  for (int64_t i = 0; i < args.item_count; ++i)
    pieces += cut_of_item(args.items[i]).pieces * args.items[i].samples;
  double* table = static_cast<double*>(allocate_scratch(pieces * int64_t(sizeof(double))));
  if (!table) return Status::out_of_memory;
  each_piece(args, [&](const SampleItem& item, const Cut& cut, int64_t sample, int64_t part,
                       int64_t place) {
    const T* x = static_cast<const T*>(item.numbers) + sample * item.stride + part * piece;
    table[place] = sum_of_squares(x, cut.in_piece(part));
  });

  int64_t count = 0;
  for (int64_t g = 0; g < args.group_count; ++g) count += args.groups[g].samples;
  for (int64_t i = 0; i < count; ++i) args.sums[i] = 0;
  const double* from = table;
  for (int64_t i = 0; i < args.item_count; ++i) {
    const SampleItem& item = args.items[i];
    const int64_t parts = cut_of_item(item).pieces;
    for (int64_t sample = 0; sample < item.samples; ++sample)
      for (int64_t part = 0; part < parts; ++part) args.sums[item.first + sample] += *from++;
  }
  free(table);

  A* to = static_cast<A*>(value);
  if (args.function == SampleFunction::squares) {
    for (int64_t i = 0; i < count; ++i) to[i] = A(args.sums[i]);
    return Status::ok;
  }
  double total = 0;
  for (int64_t g = 0; g < args.group_count; ++g) total += value_of(args, args.groups[g]);
  *to = A(args.weight * total);
  return Status::ok;
}

template <class T>
Status backward(const SampleNorms& args, const void* grad_value) {
  using A = Acc<T>;
  int64_t count = 0;
  for (int64_t g = 0; g < args.group_count; ++g) count += args.groups[g].samples;
  double* factors = static_cast<double*>(allocate_scratch(count * int64_t(sizeof(double))));
  if (!factors) return Status::out_of_memory;
  const A* upstream = static_cast<const A*>(grad_value);
  if (args.function == SampleFunction::squares)
    for (int64_t i = 0; i < count; ++i) factors[i] = 2 * double(upstream[i]);
  else
    for (int64_t g = 0; g < args.group_count; ++g)
      factors_of(args, args.groups[g], double(*upstream) * args.weight, factors);
  each_piece(args,
             [&](const SampleItem& item, const Cut& cut, int64_t sample, int64_t part, int64_t) {
               if (!item.gradient) return;
               const T* x = static_cast<const T*>(item.numbers) + sample * item.stride;
               T* to = static_cast<T*>(item.gradient) + sample * item.size;
               multiply(x + part * piece, cut.in_piece(part), A(factors[item.first + sample]),
                        to + part * piece);
             });
  free(factors);
  return Status::ok;
}

}  // namespace

Status sample_norms_forward(const SampleNorms& args, void* value) {
  return for_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args, value); });
}

Status sample_norms_backward(const SampleNorms& args, const void* grad_value) {
  return for_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args, grad_value); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
