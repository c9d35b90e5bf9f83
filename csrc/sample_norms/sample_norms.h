// Norms of samples, as gradient penalties want them: the contract of the launchers.
//
// An item is a tensor of `samples` samples of `size` numbers each. Items of a group (the inputs of
// one discriminator) have the same samples; s_i is the sum of squares of sample i over the group's
// items. The value is
//
//   squares     s_i itself, one number a sample; weight and center are not used
//   square      weight · Σ over groups of  mean_i s_i                      (R1, R2)
//   distance    weight · Σ over groups of  mean_i (√s_i - center)²         (WGAN-GP, DRAGAN)
//   excess      weight · Σ over groups of  mean_i max(√s_i - center, 0)²   (one-sided WGAN-GP)
//   largest     weight · Σ over groups of  max_i s_i                       (max-GP)
//
// and its gradient for a number x of sample i is factor_i · x. Sums run in fixed chunks, so the
// result does not depend on the number of threads. Where √s_i = 0 the slope is 0, as of torch's
// norm; equal largest samples share their slope.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

enum class SampleFunction : int { squares = 0, square = 1, distance = 2, excess = 3, largest = 4 };

struct SampleItem {
  const void* numbers;
  int64_t samples, size;  // a sample's numbers lie side by side
  int64_t stride;         // numbers from one sample to the next
  int64_t first;          // its group's first entry of `sums`
  void* gradient;         // [samples, size], side by side; not used by the forward
};

struct SampleGroup {
  int64_t first, samples;  // of `sums`
};

struct SampleNorms {
  const SampleItem* items;
  int64_t item_count;
  const SampleGroup* groups;
  int64_t group_count;
  SampleFunction function;
  double center, weight;
  DType dtype;
  double* sums;  // s of all groups, one after the other: the forward writes, the backward reads
  int threads;
};

// `value`: float (double for fp64), one, or of `squares` as many as sums.
GK_EACH_LEVEL(Status sample_norms_forward(const SampleNorms& args, void* value);
              Status sample_norms_backward(const SampleNorms& args, const void* grad_value);)

#ifdef GK_HAVE_CUDA
namespace cuda {
struct ListPlan;  // common/lists.h
struct ListMemory;

// One launch for all items. The plan of a forward, or with `gradients_alone` that of a backward,
// which has blocks for the gradients that are wanted.
ListPlan sample_norms_plan(DType dtype, const SampleItem* items, int64_t item_count,
                           bool gradients_alone, int64_t blocks_aim);

// The args' items and groups are the plan's and not looked at.
Status sample_norms_forward(const SampleNorms& args, const ListPlan& plan, const ListMemory& memory,
                            void* value, void* stream);
Status sample_norms_backward(const SampleNorms& args, const ListPlan& plan,
                             const ListMemory& memory, const void* grad_value, void* stream);
}  // namespace cuda
#endif

}  // namespace genkern
