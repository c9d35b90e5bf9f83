// Mean differences of pairs of tensors: the contract of the launchers.
//
//   loss = Σ over pairs of  weight · mean φ(a - b),    φ(d) = |d| or d²
//
// Feature matching (a list of discriminators' lists of feature maps) and consistency losses. Sums
// are fp32 (fp64 for fp64 tensors), in fixed chunks.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

enum class Distance : int { absolute = 0, square = 1 };

struct DifferencePair {
  const void *a, *b;  // `count` elements each, in the same order
  int64_t count;
  double weight;
  void *grad_a, *grad_b;  // in the tensors' dtype and order, or null where not wanted
};

struct DifferencesForward {
  Distance distance;
  DType dtype;
  const DifferencePair* pairs;  // their gradients: dloss/da, dloss/db
  int64_t count;
  void* loss;  // one float (double for fp64)
  int threads;
};

struct DifferencesBackward {
  Distance distance;
  DType dtype;
  const DifferencePair* pairs;
  int64_t count;
  const void* grad_loss;  // one float (double for fp64), multiplied in before rounding
  int threads;
};

GK_EACH_LEVEL(Status differences_forward(const DifferencesForward& args);
              Status differences_backward(const DifferencesBackward& args);)

#ifdef GK_HAVE_CUDA
namespace cuda {
struct ListPlan;  // common/lists.h
struct ListMemory;

// One launch for the whole list. The plan of a forward, or with `gradients_alone` that of a
// backward, which has blocks for the gradients that are wanted. A forward writes those too, for a
// grad_loss of 1.
ListPlan differences_plan(DType dtype, const DifferencePair* pairs, int64_t count,
                          bool gradients_alone, int64_t blocks_aim);

// The args' pairs are the plan's and not looked at.
Status differences_forward(const DifferencesForward& args, const ListPlan& plan,
                           const ListMemory& memory, void* stream);
// `is_done_for_one`: the gradients are a forward's, to be left as they are where grad_loss is 1.
Status differences_backward(const DifferencesBackward& args, const ListPlan& plan,
                            const ListMemory& memory, bool is_done_for_one, void* stream);
}  // namespace cuda
#endif

}  // namespace genkern
