// Kullback-Leibler divergence of diagonal Gaussians on the CPU: one pass forward, one backward.
//
// Layout: rows, cut into tasks by common/pieces.h. Plan of a task: read a vector of each input,
// compute all terms in fp32 (fp64 for fp64), write what is wanted; the task's sum goes into a
// table, in double, that one thread adds up in order. Floor: the traffic, and two exponentials an
// element where the second Gaussian is not the standard normal, one where it is.
#include "gaussian_kl.h"

#include "../common/parallel.h"
#include "../common/pieces.h"
#include "../common/scratch.h"
#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

template <class T>
const T* at(const Rows& rows, int64_t row, int64_t column) {
  return rows.numbers ? static_cast<const T*>(rows.numbers) + row * rows.stride + column : nullptr;
}
template <class T>
T* at_output(const Rows& rows, int64_t row, int64_t column) {
  return rows.numbers ? static_cast<T*>(rows.numbers) + row * rows.stride + column : nullptr;
}

// What the formulas are made of: r = e^(l - k), q = (μ - m)² e^-k, slope = (μ - m) e^-k.
template <class A>
struct Parts {
  Vec<A> ratio, square, slope, difference;  // difference: l - k
};

template <class T>
Parts<Acc<T>> parts_of(const T* mean, const T* logvar, const T* other_mean, const T* other_logvar,
                       int64_t n) {
  using A = Acc<T>;
  const Vec<A> mu = load_some(mean, n), l = load_some(logvar, n);
  if (!other_mean) return {exp(l), mu * mu, mu, l};
  const Vec<A> away = mu - load_some(other_mean, n), k = load_some(other_logvar, n);
  const Vec<A> slope = away * exp(-k), difference = l - k;
  return {exp(difference), away * slope, slope, difference};
}

// body(parts, offset from the piece's begin, numbers left) along a piece.
template <class T, class Body>
void along(const GaussianKl& args, int64_t row, int64_t begin, int64_t n, const Body& body) {
  const T* mean = at<T>(args.mean, row, begin);
  const T* logvar = at<T>(args.logvar, row, begin);
  const T* other_mean = at<T>(args.other_mean, row, begin);
  const T* other_logvar = at<T>(args.other_logvar, row, begin);
  for (int64_t i = 0; i < n; i += lanes<Acc<T>>())
    body(parts_of(mean + i, logvar + i, other_mean ? other_mean + i : nullptr,
                  other_mean ? other_logvar + i : nullptr, n - i),
         i, n - i);
}

int team_of(const GaussianKl& args) {
  return args.rows * args.size < parallel_from ? 1 : args.threads;
}

template <class T>
Status forward(const GaussianKl& args, const Rows& terms, void* sum, double factor) {
  using A = Acc<T>;
  const Cut cut = cut_of(args.rows, args.size);
  double* table = static_cast<double*>(allocate_scratch(cut.tasks * int64_t(sizeof(double))));
  if (!table) return Status::out_of_memory;
  parallel(cut.tasks, team_of(args), [&](int64_t task, int) {
    double total = 0;
    cut.in_task(task, [&](int64_t row, int64_t part) {
      const int64_t begin = part * piece;
      A* to = at_output<A>(terms, row, begin);
      Vec<A> some{};
      int added = 0;
      const auto flush = [&] {
        for (int lane = 0; lane < lanes<A>(); ++lane) total += double(some[lane]);
        some = Vec<A>{};
        added = 0;
      };
      along<T>(args, row, begin, cut.in_piece(part), [&](const auto& p, int64_t i, int64_t n) {
        const Vec<A> kl = A(0.5) * (p.ratio + p.square - A(1) - p.difference);
        if (to) store_some(to + i, kl, n);
        some += select(first_lanes<A>(n), kl, Vec<A>{});
        if (++added == 64) flush();
      });
      flush();
    });
    table[task] = total;
  });
  double total = 0;
  for (int64_t task = 0; task < cut.tasks; ++task) total += table[task];
  free(table);
  if (sum) *static_cast<A*>(sum) = A(factor * total);
  return Status::ok;
}

template <class T>
Status backward(const GaussianKl& args, const GaussianKlGradients& gradients, const void* upstream,
                const Rows& each_upstream, double factor) {
  using A = Acc<T>;
  const Cut cut = cut_of(args.rows, args.size);
  const A one = upstream ? A(factor * double(*static_cast<const A*>(upstream))) : A(factor);
  parallel(cut.tasks, team_of(args), [&](int64_t task, int) {
    cut.in_task(task, [&](int64_t row, int64_t part) {
      const int64_t begin = part * piece;
      const A* each = at<A>(each_upstream, row, begin);
      T* mean = at_output<T>(gradients.mean, row, begin);
      T* logvar = at_output<T>(gradients.logvar, row, begin);
      T* other_mean = at_output<T>(gradients.other_mean, row, begin);
      T* other_logvar = at_output<T>(gradients.other_logvar, row, begin);
      along<T>(args, row, begin, cut.in_piece(part), [&](const auto& p, int64_t i, int64_t n) {
        const Vec<A> g = each ? load_some(each + i, n) : splat(one);
        const Vec<A> half = A(0.5) * g, slope = p.slope * g;
        if (mean) store_some(mean + i, slope, n);
        if (logvar) store_some(logvar + i, half * (p.ratio - A(1)), n);
        if (other_mean) store_some(other_mean + i, -slope, n);
        if (other_logvar) store_some(other_logvar + i, half * (A(1) - p.ratio - p.square), n);
      });
    });
  });
  return Status::ok;
}

}  // namespace

Status gaussian_kl_forward(const GaussianKl& args, const Rows& terms, void* sum, double factor) {
  return for_dtype(args.dtype,
                   [&](auto t) { return forward<decltype(t)>(args, terms, sum, factor); });
}

Status gaussian_kl_backward(const GaussianKl& args, const GaussianKlGradients& gradients,
                            const void* upstream, const Rows& each_upstream, double factor) {
  return for_dtype(args.dtype, [&](auto t) {
    return backward<decltype(t)>(args, gradients, upstream, each_upstream, factor);
  });
}

}  // namespace GK_LEVEL
}  // namespace genkern
