// Spectral normalization of a list of weights: the contract of the launchers. Formulas:
// genkern/ops/spectral_norm/reference.py.
//
// A weight fills its memory without gaps, seen as [outer, rows, inner]: the matrix of kernels' and
// papers' W [rows, cols] with cols = outer·inner has W(i, o·inner + j) at (o·rows + i)·inner + j.
// Normalising dimension 0 means outer = 1, a plain row-major matrix; dimension 1 (transposed
// convolutions) has outer = shape[0].
//
// The columns may lie in memory in another order than v's: v as a matrix [v_leading, …], memory as
// its transpose. A channels_last weight normalised along dimension 0 has v_leading = shape[1];
// v_leading = 1 is one order for both. v is in its own order here wherever it comes or goes.
//
// "Sum type": float, double for fp64 weights; everything is computed in it.
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
  int64_t outer, rows, inner, v_leading;
  int64_t iterations;  // 0: u and v as they are
  bool wide_state;     // u, v and their stores have the sum type rather than the weights' dtype
  const void* u;       // [rows], before
  const void* v;       // [cols], before
  void* store_u;       // where to write the vectors after the iterations, in the dtype of u and v:
  void* store_v;       // u and v themselves, or null
  void* new_u;         // the same in the sum type
  void* new_v;
  void* normalized;  // W / σ, laid out as the weight; its memory may be fresh
  void* sigma;       // one element of the sum type: u·(W v) with the new u and v
};

struct SpectralBackward {
  const void* grad_normalized;  // null where this output got no gradient
  const void* normalized;
  int64_t outer, rows, inner, v_leading;
  const void* u;  // the forward's new_u and new_v
  const void* v;
  const void* sigma;
  const void* grad_sigma;  // one element of the sum type, or null
  void* grad_weight;
};

struct SpectralOptions {
  DType dtype;
  UpdateOrder order;  // the backward ignores it, and eps
  double eps;
  int threads;
};

GK_EACH_LEVEL(Status spectral_norm_forward(const SpectralForward* list, int64_t count,
                                           const SpectralOptions& options);
              Status spectral_norm_backward(const SpectralBackward* list, int64_t count,
                                            const SpectralOptions& options);)

}  // namespace genkern
