// Attention: the contract of the launchers. Formulas: genkern/ops/attention/reference.py.
//
//   q [B, H, N, d]   k [B, H, M, d]   v [B, H, M, dv]   out [B, H, N, dv]   lse [B, H, N]
//   S = scale·q·kᵀ    P = softmax(S) over allowed keys    out = P·v    lse = log Σ exp S
//
// Causal: query i sees keys j ≤ i (aligned at the top left, as in PyTorch). A row with no key (M =
// 0) gives zeros and lse -inf. The last dimension of every tensor is contiguous; the others have
// any stride, in elements. lse is fp32 (fp64 for fp64), contiguous. Nothing N×M is ever stored.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

// A tensor [B, H, rows, last]: data and the strides of its first three dimensions.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

struct AttentionShape {
  DType dtype;
  int64_t B, H, N, M, d, dv;
  double scale;
  bool is_causal;
  int threads;
};

struct AttentionForward {
  AttentionShape shape;
  Heads q, k, v, out;
  void* lse;
};

struct AttentionBackward {
  AttentionShape shape;
  Heads q, k, v, out, grad_out;
  const void* lse;
  Heads grad_q, grad_k, grad_v;  // data null: not wanted
};

GK_EACH_LEVEL(Status attention_forward(const AttentionForward& args);
              Status attention_backward(const AttentionBackward& args);)

}  // namespace genkern
