// Norms of samples in CUDA: all groups of all items in one launch forward and one backward. The
// meaning is sample_norms.h's.
//
// Layout: an array is one item, of rows that are samples; how rows become blocks: common/lists.h.
// Plan of the forward: a block leaves the sum of squares of its piece of one sample; the last to
// arrive adds the pieces up sample by sample, in order, keeps the samples' sums and makes the value
// of them. Backward, elementwise: a block makes its sample's factor of the sums and of grad_value,
// read on the device, and multiplies. Floor: one read forward, one read and one write backward.
#include <math.h>

#include "../common/launch.cuh"
#include "../common/lists.cuh"
#include "sample_norms.h"

namespace genkern {
namespace cuda {
namespace sample_norms {

struct ItemArray {
  int64_t first, pieces;  // its first block, blocks of a sample
  const void* numbers;
  void* gradient;
  int64_t samples, size, stride;
  int64_t group_first;  // its group's first entry of `sums`
  int64_t ends_group;   // whether the next item is of another group
};

struct Problem {
  SampleFunction function;
  double center, weight;
  double* sums;
};

// What the block does: one piece of one sample.
struct Piece {
  int64_t sample, place;
};
__device__ inline Piece piece_of(const ItemArray& item) {
  const int64_t block = blockIdx.x - item.first;
  return {block / item.pieces, block % item.pieces};
}

// The larger sum; a NaN is the largest, as in PyTorch.
__device__ inline double larger(double x, double y) { return x != x || x > y ? x : y; }
__device__ inline bool is_largest(double s, double largest) { return s == largest || s != s; }

// ---- The last block of the forward --------------------------------------------------------------

// The sums of squares of a group's samples, of items [begin, end): to `sums`. As many lanes as a
// sample has pieces, a power of two of them, add one sample up.
__device__ inline void add_samples_up(const Problem& problem, const List<ItemArray>& list,
                                      int64_t begin, int64_t end) {
  int64_t most = 1;
  for (int64_t i = begin; i < end; ++i)
    if (entry_of(list, i).pieces > most) most = entry_of(list, i).pieces;
  int lanes = 1;
  while (lanes < warp_threads && lanes < most) lanes *= 2;
  const int64_t samples = entry_of(list, begin).samples, together = list_threads / lanes;
  const int64_t lane = threadIdx.x % lanes;
  for (int64_t at = 0; at < samples; at += together) {
    const int64_t sample = at + threadIdx.x / lanes;
    double s = 0;
    for (int64_t i = begin; i < end && sample < samples; ++i) {
      const ItemArray item = entry_of(list, i);
      const double* parts = list.memory.partials + item.first + sample * item.pieces;
      for (int64_t piece = lane; piece < item.pieces; piece += lanes) s += parts[piece];
    }
    for (int other = lanes / 2; other > 0; other /= 2) s += __shfl_xor_sync(all_lanes, s, other);
    if (lane == 0 && sample < samples) problem.sums[entry_of(list, begin).group_first + sample] = s;
  }
}

// The group's largest sum, in every thread.
__device__ inline double largest_of(const double* sums, int64_t samples) {
  __shared__ double of_threads[list_threads];
  double largest = -1;
  for (int64_t i = threadIdx.x; i < samples; i += list_threads) largest = larger(sums[i], largest);
  of_threads[threadIdx.x] = largest;
  __syncthreads();
  for (int half = list_threads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half)
      of_threads[threadIdx.x] = larger(of_threads[threadIdx.x], of_threads[threadIdx.x + half]);
    __syncthreads();
  }
  largest = of_threads[0];
  __syncthreads();  // before the next call
  return largest;
}

template <class A>
__device__ void finish(const Problem& problem, const List<ItemArray>& list,
                       bool has_mean_of_nothing, A* value) {
  double mine[1] = {0};
  for (int64_t begin = 0, end; begin < list.arrays; begin = end) {
    for (end = begin + 1; !entry_of(list, end - 1).ends_group;) ++end;
    add_samples_up(problem, list, begin, end);
    __syncthreads();
    const ItemArray item = entry_of(list, begin);
    const double* sums = problem.sums + item.group_first;
    if (problem.function == SampleFunction::largest) {
      const double largest = largest_of(sums, item.samples);
      if (threadIdx.x == 0) mine[0] += largest;
      continue;
    }
    double total = 0;
    for (int64_t i = threadIdx.x; i < item.samples; i += list_threads) {
      const double s = sums[i];
      if (problem.function == SampleFunction::squares) {
        value[item.group_first + i] = A(s);
      } else if (problem.function == SampleFunction::square) {
        total += s;
      } else {
        const double beyond = sqrt(s) - problem.center;
        if (problem.function == SampleFunction::distance || !(beyond <= 0))
          total += beyond * beyond;
      }
    }
    if (item.samples > 0) mine[0] += total / double(item.samples);
  }
  const double everything = problem.weight * block_sums(mine);
  if (threadIdx.x == 0 && problem.function != SampleFunction::squares)
    *value = has_mean_of_nothing ? A(NAN) : A(everything);
}

// ---- Backward -----------------------------------------------------------------------------------

// How many of the group's samples have the largest sum; valid in thread 0.
__device__ inline double ties_of(const double* sums, int64_t samples, double largest) {
  double mine[1] = {0};
  for (int64_t i = threadIdx.x; i < samples; i += list_threads)
    mine[0] += is_largest(sums[i], largest);
  return block_sums(mine);
}

// d value / d s_i times 2, since d s_i / d x = 2 x; valid in thread 0.
template <class A>
__device__ double factor_of(const Problem& problem, const ItemArray& item, int64_t sample,
                            const A* grad_value) {
  const double* sums = problem.sums + item.group_first;
  if (problem.function == SampleFunction::squares)
    return 2 * double(grad_value[item.group_first + sample]);
  double ties = 1, largest = 0;
  if (problem.function == SampleFunction::largest) {
    largest = largest_of(sums, item.samples);
    ties = ties_of(sums, item.samples, largest);
  }
  if (threadIdx.x != 0) return 0;
  const double upstream = 2 * double(*grad_value) * problem.weight;
  if (problem.function == SampleFunction::largest)
    return is_largest(sums[sample], largest) ? upstream / ties : 0;
  const double each = upstream / double(item.samples);
  if (problem.function == SampleFunction::square) return each;
  const double root = sqrt(sums[sample]), beyond = root - problem.center;
  const bool is_flat = root == 0 || (problem.function == SampleFunction::excess && beyond <= 0);
  return is_flat ? 0 : each * (beyond / root);
}

// ---- Kernels ------------------------------------------------------------------------------------

// Four blocks at once are enough here, and ptxas would rather spill for the sake of more.

template <class T>
__global__ void __launch_bounds__(list_threads, 4)
    sample_norms_forward_kernel(Problem problem, const __grid_constant__ List<ItemArray> list,
                                bool has_mean_of_nothing, Acc<T>* value) {
  using A = Acc<T>;
  constexpr int n = width<T>;
  const ItemArray item = entry_of(list, array_of(list));
  A mine[1] = {0};
  if (item.pieces > 0) {
    const Piece piece = piece_of(item);
    const T* x = static_cast<const T*>(item.numbers) + piece.sample * item.stride;
    along<T>(piece.place, list.run, item.size, [&](int64_t at, int64_t left) {
      A numbers[n], some = 0;
      load(x + at, left, numbers);
#pragma unroll
      for (int i = 0; i < n; ++i) some += numbers[i] * numbers[i];
      mine[0] += some;
    });
  }
  leave(list.memory.partials, mine);
  if (arrives_last(list.memory.counter)) finish(problem, list, has_mean_of_nothing, value);
}

template <class T>
__global__ void __launch_bounds__(list_threads, 4)
    sample_norms_backward_kernel(Problem problem, const __grid_constant__ List<ItemArray> list,
                                 const Acc<T>* grad_value) {
  using A = Acc<T>;
  constexpr int n = width<T>;
  __shared__ A shared_factor;
  const ItemArray item = entry_of(list, array_of(list));
  if (item.pieces == 0) return;
  const Piece piece = piece_of(item);
  const double of_sample = factor_of(problem, item, piece.sample, grad_value);
  if (threadIdx.x == 0) shared_factor = A(of_sample);
  __syncthreads();
  const A factor = shared_factor;
  const T* x = static_cast<const T*>(item.numbers) + piece.sample * item.stride;
  T* gradient = static_cast<T*>(item.gradient) + piece.sample * item.size;
  along<T>(piece.place, list.run, item.size, [&](int64_t at, int64_t left) {
    A numbers[n];
    load(x + at, left, numbers);
#pragma unroll
    for (int i = 0; i < n; ++i) numbers[i] *= factor;
    store(gradient + at, left, numbers);
  });
}

Problem problem_of(const SampleNorms& args) {
  return {args.function, args.center, args.weight, args.sums};
}

}  // namespace sample_norms

using namespace sample_norms;

ListPlan sample_norms_plan(DType dtype, const SampleItem* items, int64_t item_count,
                           bool gradients_alone, int64_t blocks_aim) {
  ListPlanner planner(element_bytes(dtype), blocks_aim, gradients_alone ? 0 : 1);
  const auto samples = [&](const SampleItem& x) {
    return gradients_alone && !x.gradient ? 0 : x.samples;
  };
  for (int64_t i = 0; i < item_count; ++i) planner.count(items[i].size, samples(items[i]));
  for (int64_t i = 0; i < item_count; ++i) {
    const SampleItem& x = items[i];
    const SampleItem* next = i + 1 < item_count ? &x + 1 : nullptr;
    const bool ends_group = !next || next->first != x.first || next->samples != x.samples;
    const int64_t pieces = planner.blocks_of_row(x.size);
    if (x.samples == 0) planner.mean_of_nothing();
    planner.add(ItemArray{planner.next_block(), pieces, x.numbers, x.gradient, x.samples, x.size,
                          x.stride, x.first, ends_group},
                pieces * samples(x));
  }
  return planner.finish();
}

Status sample_norms_forward(const SampleNorms& args, const ListPlan& plan, const ListMemory& memory,
                            void* value, void* stream) {
  const auto list = list_of<ItemArray>(plan, memory);
  return for_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch(sample_norms_forward_kernel<T>, unsigned(plan.blocks), list_threads, 0, stream,
                  problem_of(args), list, plan.has_mean_of_nothing, static_cast<Acc<T>*>(value));
  });
}

Status sample_norms_backward(const SampleNorms& args, const ListPlan& plan,
                             const ListMemory& memory, const void* grad_value, void* stream) {
  const auto list = list_of<ItemArray>(plan, memory);
  return for_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch(sample_norms_backward_kernel<T>, unsigned(plan.blocks), list_threads, 0, stream,
                  problem_of(args), list, static_cast<const Acc<T>*>(grad_value));
  });
}

}  // namespace cuda
}  // namespace genkern
