// Kullback-Leibler divergence of diagonal Gaussians: the contract of the launchers.
//
// Of N(μ, e^l) from N(m, e^k), element by element:
//
//   KL = ½ (e^(l - k) + (μ - m)² e^-k - 1 - (l - k))
//   dμ = (μ - m) e^-k = -dm     dl = ½ (e^(l - k) - 1)     dk = ½ (1 - e^(l - k) - (μ - m)² e^-k)
//
// The standard normal is m = k = 0, given by no address. Every tensor is `rows` rows of `size`
// numbers that lie side by side, rows anywhere.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

struct Rows {
  void* numbers;   // null where there are none, or none are wanted
  int64_t stride;  // numbers from one row to the next
};

struct GaussianKl {
  int64_t rows, size;
  Rows mean, logvar;              // μ, l
  Rows other_mean, other_logvar;  // m, k: both or neither
  DType dtype;
  int threads;
};

struct GaussianKlGradients {
  Rows mean, logvar, other_mean, other_logvar;
};

// `terms` (in float, or double for fp64) get the elements' KL where wanted; `sum`, one number of
// that type, or null, `factor` times their sum. Backward, the gradients are multiplied by
// factor · *upstream, or by each_upstream's own for every element, where that is given.
GK_EACH_LEVEL(
    Status gaussian_kl_forward(const GaussianKl& args, const Rows& terms, void* sum, double factor);
    Status gaussian_kl_backward(const GaussianKl& args, const GaussianKlGradients& gradients,
                                const void* upstream, const Rows& each_upstream, double factor);)

#ifdef GK_HAVE_CUDA
namespace cuda {
struct ListPlan;  // common/lists.h
struct ListMemory;

// One launch each. The plan of `count` elements; a forward with a sum needs memory for it, without
// a table.
ListPlan gaussian_kl_plan(DType dtype, int64_t count, bool with_sum, int64_t blocks_aim);
Status gaussian_kl_forward(const GaussianKl& args, const ListPlan& plan, const ListMemory& memory,
                           const Rows& terms, void* sum, double factor, void* stream);
Status gaussian_kl_backward(const GaussianKl& args, const ListPlan& plan,
                            const GaussianKlGradients& gradients, const void* upstream,
                            const Rows& each_upstream, double factor, void* stream);
}  // namespace cuda
#endif

}  // namespace genkern
