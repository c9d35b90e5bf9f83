// Attention: the contract of the launchers. Formulas: genkern/ops/attention/reference.py.
//
//   q [B, H, N, d]   k [B, Hk, M, d]   v [B, Hk, M, dv]   out [B, H, N, dv]   Hk ≥ 1 divides H
//   X = scale·q·kᵀ      S = softcap·tanh(X/softcap) + bias + key_bias      P = softmax(S)
//   out = (Z∘P)·v       lse = log Σ exp S
//
// Query i sees the keys lo(i) ≤ j < hi(i): lo(i) = max(0, i + offset - left), hi(i) = min(keys of
// the sequence, i + offset + right + 1). A row with nothing to see gives zeros and lse = -inf. Z is
// dropout's mask times 1/(1 - p), a function of the seed and the place (logits.h). The last
// dimension of every tensor is contiguous; the others have any stride, in elements, also 0. Nothing
// N×M is stored, unless a bias of that size wants a gradient.
//
// Of the forward's results the derivatives need two numbers a row, in the arithmetic type, fp32
// (fp64 for fp64): a shift and the sum Σ exp(S - shift), which as one rounded logsumexp would cost
// digits of P.
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

// A number for every row of q, or for every key of every head of k: [B, H, rows], arithmetic type.
struct RowNumbers {
  void* data;
  int64_t batch, head;
};

enum class BiasType : int { storage = 0, arithmetic = 1, boolean = 2 };  // boolean: 0 hides

// An additive term of the logits [B, H, N, M]: strides 0 where it is broadcast. A gradient of one
// is of the arithmetic type.
struct Bias {
  void* data;  // null: there is none
  BiasType type;
  int64_t batch, head, row, key;
};

struct AttentionProblem {
  DType dtype;
  int64_t B, H, Hk, N, M, d, dv;
  double scale, softcap, dropout;  // softcap 0: none
  int64_t left, right;
  bool lower_right;  // offset = keys - queries; else 0
  uint64_t seed;
  int threads;
  // Sequences of several lengths, one after another (then N and M are the longest, and batch
  // strides 0): sequence b has rows [q_starts[b], q_starts[b + 1]) and keys likewise. Or null.
  const int64_t *q_starts, *k_starts;
  const int64_t* key_lengths;  // [B], or null: how many keys of each batch element there are
  Bias bias;
  RowNumbers key_bias;
  Heads q, k, v;
};

// The output in fp32, not rounded to the storage type: [dv, B, H, N], so that a feature of
// neighbouring rows lies together. Data null: not kept.
struct KeptOut {
  void* data;
  int64_t feature, batch, head;
};

// Of every row: shift and sum = Σ exp(S - shift), both 0 where nothing is seen. shift is max S, or
// (on AMX in bf16) so near below it that no exp exceeds 2^8. Without softcap and bias, shift is in
// units of |scale|: S = |scale|·(sign(scale)·q·k).
struct SoftmaxRows {
  RowNumbers shift, sum;
  KeptOut out = {};
};

// Tangents of (or cotangents of the gradients of) the inputs; data null: zero.
struct Tangents {
  Heads q, k, v;
  Bias bias;
  RowNumbers key_bias;
};

// Results of the inputs' shapes; data null: not wanted.
struct InputGradients {
  Heads q, k, v;
  Bias bias;
  RowNumbers key_bias;
};

struct AttentionForward {
  AttentionProblem problem;
  Heads out;
  SoftmaxRows rows;  // data null: not wanted (on the CPU)
  RowNumbers lse;    // data null: not wanted
};

// The gradients of ⟨grad_out, out⟩ + ⟨grad_lse, lse⟩.
struct AttentionBackward {
  AttentionProblem problem;
  SoftmaxRows rows;
  Heads grad_out;
  RowNumbers grad_lse;  // data null: zero
  InputGradients grads;
};

// The gradients of ⟨backward's results, tangents⟩, with respect to inputs, grad_out and grad_lse.
struct AttentionSecond {
  AttentionProblem problem;
  SoftmaxRows rows;
  Heads grad_out;
  RowNumbers grad_lse;
  Tangents tangents;
  InputGradients grads;
  Heads out_grad_out;
  RowNumbers out_grad_lse;
};

// The derivative of out and lse along the tangents. Where `out` has data (on the CPU) it and lse,
// unless that has none, are results too, and `rows` is not read.
struct AttentionJvp {
  AttentionProblem problem;
  SoftmaxRows rows;
  Tangents tangents;
  Heads out_tangent;
  RowNumbers lse_tangent;
  Heads out;
  RowNumbers lse;
};

GK_EACH_LEVEL(Status attention_forward(const AttentionForward& args);
              Status attention_backward(const AttentionBackward& args);
              Status attention_second(const AttentionSecond& args);
              Status attention_jvp(const AttentionJvp& args);)

namespace cuda {

// What the CUDA launchers need beside the contract's structs. Of several sequences N and M are all
// rows here, and the longest sequences stand in this; the problem's own seed is not read. Every
// launcher asks for fp32, bf16 or fp16 and at most 256 features.
struct AttentionLaunch {
  const int64_t* seed;  // of dropout, on the device; null: none
  int64_t longest_q, longest_k;
  void* stream;
};

// What the backward's sweep by rows tells the passes after it, of every row: the shift as it is
// taken off exp2's argument, +inf where the row sees nothing; 1 / sum, then 0; and level = δ - λ.
struct RowFacts {
  RowNumbers shift, inverse, level;
};

Status attention_forward(const AttentionForward& args, const AttentionLaunch& call);

// The facts, and the gradient of q (data null: not wanted); no other gradient is looked at.
Status attention_backward_rows(const AttentionBackward& args, const RowFacts& facts,
                               const AttentionLaunch& call);

// The gradients of k and v, and dS summed over the queries of every head, [B, H, M]: each wanted
// where its data is not null.
struct AttentionColumns {
  AttentionProblem problem;
  RowFacts facts;
  Heads grad_out, grad_k, grad_v;
  RowNumbers sums;
};
Status attention_backward_columns(const AttentionColumns& args, const AttentionLaunch& call);

// The gradient of a bias [batches, heads, N, M] with rows and keys of its own: dS summed over what
// shares it.
struct AttentionBiasGradient {
  AttentionProblem problem;
  RowFacts facts;
  Heads grad_out;
  Bias grad;
  int64_t batches, heads;
};
Status attention_bias_gradient(const AttentionBiasGradient& args, const AttentionLaunch& call);

// What second order's sweep by rows tells the passes after it, of every row. The passes of second
// order and forward mode ask for at most 128 features.
struct SecondFacts {
  RowNumbers shift, inverse, level, tau, rho;
};

// The facts, of which τ is the gradient of grad_lse, and the gradients of q and grad_out (data
// null: not wanted); no other gradient is looked at.
Status attention_second_rows(const AttentionSecond& args, const SecondFacts& facts,
                             const AttentionLaunch& call);

// The gradients of k and v, and W (second.cuh) summed over the queries of every head, [B, H, M]:
// each wanted where its data is not null.
struct AttentionSecondColumns {
  AttentionProblem problem;
  SecondFacts facts;
  Tangents tangents;
  Heads grad_out, of_k, of_v;
  RowNumbers sums;
};
Status attention_second_columns(const AttentionSecondColumns& args, const AttentionLaunch& call);

// The gradient of a bias [batches, heads, N, M] with rows and keys of its own: W summed over what
// shares it.
struct AttentionSecondBias {
  AttentionProblem problem;
  SecondFacts facts;
  Tangents tangents;
  Heads grad_out;
  Bias grad;
  int64_t batches, heads;
};
Status attention_second_bias(const AttentionSecondBias& args, const AttentionLaunch& call);

// lse_tangent: data null, not wanted.
Status attention_jvp(const AttentionJvp& args, const AttentionLaunch& call);

}  // namespace cuda

}  // namespace genkern
