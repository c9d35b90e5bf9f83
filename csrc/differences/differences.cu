// Mean differences of pairs of tensors in CUDA: a list of pairs in one launch forward and one
// backward. The meaning is differences.h's.
//
// Layout: an array is one pair, read together; how arrays become blocks, and blocks' sums one sum:
// common/lists.cuh. Plan of the forward: a block reads its part of both once, writes their
// gradients where they are wanted already, and leaves its part of weight · mean φ(a - b); the last
// block to arrive adds up all parts. Backward, elementwise: grad_loss is read on the device and
// multiplied in before the one rounding. Where the forward has written the gradients and grad_loss
// is 1, nothing is left to do. Floor: one read of both tensors, one write of each gradient.
#include <math.h>

#include "../common/launch.cuh"
#include "../common/lists.cuh"
#include "differences.h"

namespace genkern {
namespace cuda {
namespace differences {

struct PairArray {
  int64_t first;  // block
  const void *a, *b;
  void *grad_a, *grad_b;  // where wanted
  int64_t count;
  double scale;  // weight / count
};

// Reads the block's part of the pair, writes gradients where wanted and returns Σ φ of the thread's
// elements.
template <class T, bool is_summing>
__device__ Acc<T> sweep(Distance distance, const PairArray& pair, int64_t run, Acc<T> upstream) {
  using A = Acc<T>;
  constexpr int n = width<T>;
  const T* a = static_cast<const T*>(pair.a);
  const T* b = static_cast<const T*>(pair.b);
  T* grad_a = static_cast<T*>(pair.grad_a);
  T* grad_b = static_cast<T*>(pair.grad_b);
  const bool is_square = distance == Distance::square;
  const A factor = A(double(upstream) * pair.scale);
  A total = 0;
  along<T>(blockIdx.x - pair.first, run, pair.count, [&](int64_t at, int64_t left) {
    A x[n], y[n], gradient[n], some = 0;
    load(a + at, left, x);
    load(b + at, left, y);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A d = x[i] - y[i];  // zero beyond the end
      if (is_summing) some += is_square ? d * d : d < A(0) ? -d : d;
      // The sign is 0 at 0 and, as in PyTorch, at NaN.
      const A slope = is_square ? d + d : A(d > A(0)) - A(d < A(0));
      gradient[i] = slope * factor;
    }
    total += some;
    if (grad_a) store(grad_a + at, left, gradient);
    if (!grad_b) return;
#pragma unroll
    for (int i = 0; i < n; ++i) gradient[i] = -gradient[i];
    store(grad_b + at, left, gradient);
  });
  return total;
}

template <class T>
__global__ void __launch_bounds__(list_threads)
    differences_forward_kernel(Distance distance, const __grid_constant__ List<PairArray> list,
                               bool has_mean_of_nothing, Acc<T>* loss) {
  const PairArray pair = entry_of(list, array_of(list));
  const Acc<T> mine[1] = {sweep<T, true>(distance, pair, list.run, 1)};
  leave(list.memory.partials, mine, pair.scale);
  if (!arrives_last(list.memory.counter)) return;
  const double everything = all_added_up(list.memory.partials);
  if (threadIdx.x == 0) *loss = has_mean_of_nothing ? Acc<T>(NAN) : Acc<T>(everything);
}

// `is_done_for_one`: the gradients are there already, for a grad_loss of 1.
template <class T>
__global__ void __launch_bounds__(list_threads)
    differences_backward_kernel(Distance distance, const __grid_constant__ List<PairArray> list,
                                const Acc<T>* grad_loss, bool is_done_for_one) {
  const Acc<T> upstream = *grad_loss;
  if (is_done_for_one && upstream == Acc<T>(1)) return;
  sweep<T, false>(distance, entry_of(list, array_of(list)), list.run, upstream);
}

}  // namespace differences

using differences::PairArray;

ListPlan differences_plan(DType dtype, const DifferencePair* pairs, int64_t count,
                          bool gradients_alone, int64_t blocks_aim) {
  ListPlanner planner(element_bytes(dtype), blocks_aim, gradients_alone ? 0 : 1);
  const auto size = [&](const DifferencePair& x) {
    return gradients_alone && !x.grad_a && !x.grad_b ? 0 : x.count;
  };
  for (int64_t i = 0; i < count; ++i) planner.count(size(pairs[i]));
  for (int64_t i = 0; i < count; ++i) {
    const DifferencePair& x = pairs[i];
    if (x.count == 0) planner.mean_of_nothing();
    const double scale = x.count ? x.weight / double(x.count) : 0;
    planner.add(PairArray{planner.next_block(), x.a, x.b, x.grad_a, x.grad_b, x.count, scale},
                planner.blocks_of_row(size(x)));
  }
  return planner.finish();
}

Status differences_forward(const DifferencesForward& args, const ListPlan& plan,
                           const ListMemory& memory, void* stream) {
  const auto list = list_of<PairArray>(plan, memory);
  return for_dtype(args.dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    return launch(differences::differences_forward_kernel<decltype(t)>, unsigned(plan.blocks),
                  list_threads, 0, stream, args.distance, list, plan.has_mean_of_nothing,
                  static_cast<A*>(args.loss));
  });
}

Status differences_backward(const DifferencesBackward& args, const ListPlan& plan,
                            const ListMemory& memory, bool is_done_for_one, void* stream) {
  const auto list = list_of<PairArray>(plan, memory);
  return for_dtype(args.dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    return launch(differences::differences_backward_kernel<decltype(t)>, unsigned(plan.blocks),
                  list_threads, 0, stream, args.distance, list,
                  static_cast<const A*>(args.grad_loss), is_done_for_one);
  });
}

}  // namespace cuda
}  // namespace genkern
