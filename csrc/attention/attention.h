// Attention: the contract of the launchers. Formulas: genkern/ops/attention/reference.py.
//
//   q [B, H, N, d]   k [B, H, M, d]   v [B, H, M, dv]   out [B, H, N, dv]
//   S = scale·q·kᵀ    P = softmax(S) over allowed keys    out = P·v
//
// Causal: query i sees keys j ≤ i (aligned at the top left, as in PyTorch). A row with no key (M =
// 0) gives zeros. The last dimension of every tensor is contiguous; the others have any stride, in
// elements. Nothing N×M is ever stored.
//
// What the backward needs beside its inputs is in the arithmetic type, fp32 (fp64 for fp64), so
// that gradients are as exact as if P had been kept: per row a shift and the sum Σ exp(S - shift),
// whose sum as one rounded logsumexp would cost digits of P; and `wide_out`, out before it is
// rounded.
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

// Of every row, [B, H, N] each, contiguous: shift = max of sign(scale)·q·k over its keys, not yet
// scaled; sum = Σ exp(|scale|·(sign(scale)·q·k - shift)). So log Σ exp S = |scale|·shift + log sum.
// Both are 0 without keys.
struct SoftmaxRows {
  void *shift, *sum;
};

struct AttentionForward {
  AttentionShape shape;
  Heads q, k, v, out;
  SoftmaxRows rows;
  Heads wide_out;  // data null: not wanted
};

struct AttentionBackward {
  AttentionShape shape;
  Heads q, k, v, wide_out, grad_out;
  SoftmaxRows rows;
  Heads grad_q, grad_k, grad_v;  // data null: not wanted
};

GK_EACH_LEVEL(Status attention_forward(const AttentionForward& args);
              Status attention_backward(const AttentionBackward& args);)

}  // namespace genkern
