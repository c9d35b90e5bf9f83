// Spectral normalization of a list of weights: the contract of the launchers. Formulas:
// genkern/ops/spectral_norm/reference.py.
//
// A weight is a contiguous tensor seen as [outer, rows, inner]: the matrix of kernels' and papers'
// W [rows, cols] with cols = outer·inner has W(i, o·inner + j) at (o·rows + i)·inner + j.
// Normalising dimension 0 means outer = 1, a plain row-major matrix; dimension 1 (transposed
// convolutions) has outer = shape[0]. u has `rows` elements, v has `cols`, both in the weights'
// dtype.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

// Which vector a power iteration updates first: torch's parametrization updates u, its older
// hook (and the SNGAN code) v.
enum class UpdateOrder : int { u_first = 0, v_first = 1 };

struct SpectralForward {
  const void* weight;
  int64_t outer, rows, inner;
  const void* u;  // [rows], before
  const void* v;  // [cols], before
  void* new_u;    // after the iterations; with none (eval) a copy. May be u and v themselves.
  void* new_v;
  void* normalized;  // weight / σ, laid out as the weight
  void* sigma;       // one float (double for fp64): u·(W v) with the new u and v
};

struct SpectralBackward {
  const void* grad_normalized;  // null where this output got no gradient
  const void* normalized;
  int64_t outer, rows, inner;
  const void* u;  // as the forward left them
  const void* v;
  const void* sigma;
  const void* grad_sigma;  // one float (double for fp64), or null
  void* grad_weight;
};

struct SpectralOptions {
  DType dtype;
  UpdateOrder order;
  int n_power_iterations;  // 0: only σ and the division, u and v as they are
  double eps;
  int threads;
};

GK_EACH_LEVEL(Status spectral_norm_forward(const SpectralForward* list, int64_t count,
                                           const SpectralOptions& options);
              Status spectral_norm_backward(const SpectralBackward* list, int64_t count,
                                            const SpectralOptions& options);)

}  // namespace genkern
