// Kullback-Leibler divergence of diagonal Gaussians in CUDA: one launch forward, one backward. The
// meaning is gaussian_kl.h's.
//
// Layout: rows anywhere, their elements counted through as one flat array that common/lists.h cuts;
// a thread finds the row of its first element by one division, and loads 16 bytes at a time where
// they lie in one row. Plan of the forward: a block writes its elements' KL or leaves their sum,
// which the last block to arrive adds up. Backward, elementwise: the upstream gradient is read on
// the device, one number or one an element, and multiplied in before the one rounding. Floor: one
// read of the inputs forward, and backward one more and one write of the gradients.
#include "../common/launch.cuh"
#include "../common/lists.cuh"
#include "gaussian_kl.h"

namespace genkern {
namespace cuda {
namespace gaussian_kl {

// Where a thread's elements begin, and how many there are: n or, at the end of all rows, fewer.
struct Spot {
  int64_t row, column, left;
};
__device__ inline Spot spot_of(const GaussianKl& problem, int64_t at, int64_t left) {
  if (problem.rows == 1) return {0, at, left};
  const uint64_t index = uint64_t(at), size = uint64_t(problem.size);
  const bool is_short = (index | size) >> 32 == 0;  // the usual, several times as fast
  const int64_t row = is_short ? uint32_t(index) / uint32_t(size) : index / size;
  return {row, at - row * problem.size, left};
}

// n elements of rows from a spot on, zeros behind the last.
template <class T, int n>
__device__ void load_rows(const Rows& rows, const Spot& spot, int64_t size, Acc<T> (&to)[n]) {
  const T* row = static_cast<const T*>(rows.numbers) + spot.row * rows.stride;
  if (spot.column + n <= size || spot.left <= size - spot.column) {
    load(row + spot.column, spot.left, to);
    return;
  }
  int64_t column = spot.column;
#pragma unroll
  for (int i = 0; i < n; ++i, ++column) {
    if (column == size) {
      column = 0;
      row += rows.stride;
    }
    to[i] = i < spot.left ? Acc<T>(row[column]) : Acc<T>(0);
  }
}

template <class T, int n>
__device__ void store_rows(const Rows& rows, const Spot& spot, int64_t size,
                           const Acc<T> (&from)[n]) {
  T* row = static_cast<T*>(rows.numbers) + spot.row * rows.stride;
  if (spot.column + n <= size || spot.left <= size - spot.column) {
    store(row + spot.column, spot.left, from);
    return;
  }
  int64_t column = spot.column;
#pragma unroll
  for (int i = 0; i < n; ++i, ++column) {
    if (column == size) {
      column = 0;
      row += rows.stride;
    }
    if (i < spot.left) row[column] = T(from[i]);
  }
}

// What the formulas are made of: r = e^(l - k), q = (μ - m)² e^-k, slope = (μ - m) e^-k.
template <class A, int n>
struct Parts {
  A ratio[n], square[n], slope[n], difference[n];  // difference: l - k
};

template <class T, int n>
__device__ void load_parts(const GaussianKl& problem, const Spot& spot, Parts<Acc<T>, n>* parts) {
  using A = Acc<T>;
  A mean[n], logvar[n], other_mean[n], other_logvar[n];
  const bool has_other = problem.other_mean.numbers;
  load_rows<T>(problem.mean, spot, problem.size, mean);
  load_rows<T>(problem.logvar, spot, problem.size, logvar);
  if (has_other) {
    load_rows<T>(problem.other_mean, spot, problem.size, other_mean);
    load_rows<T>(problem.other_logvar, spot, problem.size, other_logvar);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const A away = has_other ? mean[i] - other_mean[i] : mean[i];
    parts->difference[i] = has_other ? logvar[i] - other_logvar[i] : logvar[i];
    parts->slope[i] = has_other ? away * exp(-other_logvar[i]) : away;
    parts->square[i] = away * parts->slope[i];
    parts->ratio[i] = exp(parts->difference[i]);
  }
}

// ---- Kernels ------------------------------------------------------------------------------------

// Two blocks at once are enough here, and ptxas would rather spill for the sake of more.

template <class T>
__global__ void __launch_bounds__(list_threads, 2)
    gaussian_kl_forward_kernel(GaussianKl problem, int64_t run, ListMemory memory, Rows terms,
                               double factor, Acc<T>* sum) {
  using A = Acc<T>;
  constexpr int n = width<T>;
  A mine[1] = {0};
  along<T>(blockIdx.x, run, problem.rows * problem.size, [&](int64_t at, int64_t left) {
    const Spot spot = spot_of(problem, at, left);
    Parts<A, n> p;
    load_parts<T>(problem, spot, &p);
    A kl[n], some = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      kl[i] = A(0.5) * (p.ratio[i] + p.square[i] - A(1) - p.difference[i]);
      some += kl[i];  // zero beyond the end
    }
    mine[0] += some;
    if (terms.numbers) store_rows<A>(terms, spot, problem.size, kl);
  });
  if (!sum) return;
  leave(memory.partials, mine);
  if (!arrives_last(memory.counter)) return;
  const double everything = all_added_up(memory.partials);
  if (threadIdx.x == 0) *sum = A(factor * everything);
}

// `upstream`: one number, or null where each element has its own.
template <class T>
__global__ void __launch_bounds__(list_threads, 2)
    gaussian_kl_backward_kernel(GaussianKl problem, int64_t run, GaussianKlGradients gradients,
                                const Acc<T>* upstream, Rows each_upstream, double factor) {
  using A = Acc<T>;
  constexpr int n = width<T>;
  const A one = upstream ? A(factor * double(*upstream)) : A(0);
  along<T>(blockIdx.x, run, problem.rows * problem.size, [&](int64_t at, int64_t left) {
    const Spot spot = spot_of(problem, at, left);
    Parts<A, n> p;
    load_parts<T>(problem, spot, &p);
    A g[n], product[n];
    if (upstream) {
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] = one;
    } else {
      load_rows<A>(each_upstream, spot, problem.size, g);
    }
    const auto give = [&](const Rows& gradient, const auto& of) {
      if (!gradient.numbers) return;
#pragma unroll
      for (int i = 0; i < n; ++i) product[i] = of(i);
      store_rows<T>(gradient, spot, problem.size, product);
    };
    give(gradients.mean, [&](int i) { return p.slope[i] * g[i]; });
    give(gradients.logvar, [&](int i) { return A(0.5) * g[i] * (p.ratio[i] - A(1)); });
    give(gradients.other_mean, [&](int i) { return -(p.slope[i] * g[i]); });
    give(gradients.other_logvar,
         [&](int i) { return A(0.5) * g[i] * (A(1) - p.ratio[i] - p.square[i]); });
  });
}

}  // namespace gaussian_kl

using namespace gaussian_kl;

ListPlan gaussian_kl_plan(DType dtype, int64_t count, bool with_sum, int64_t blocks_aim) {
  ListPlanner planner(element_bytes(dtype), blocks_aim, with_sum ? 1 : 0);
  planner.count(count);
  planner.add_blocks(planner.blocks_of_row(count));
  return planner.finish();
}

Status gaussian_kl_forward(const GaussianKl& args, const ListPlan& plan, const ListMemory& memory,
                           const Rows& terms, void* sum, double factor, void* stream) {
  return for_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch(gaussian_kl_forward_kernel<T>, unsigned(plan.blocks), list_threads, 0, stream,
                  args, plan.run, memory, terms, factor, static_cast<Acc<T>*>(sum));
  });
}

Status gaussian_kl_backward(const GaussianKl& args, const ListPlan& plan,
                            const GaussianKlGradients& gradients, const void* upstream,
                            const Rows& each_upstream, double factor, void* stream) {
  return for_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch(gaussian_kl_backward_kernel<T>, unsigned(plan.blocks), list_threads, 0, stream,
                  args, plan.run, gradients, static_cast<const Acc<T>*>(upstream), each_upstream,
                  factor);
  });
}

}  // namespace cuda
}  // namespace genkern
