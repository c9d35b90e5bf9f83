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

}  // namespace genkern
