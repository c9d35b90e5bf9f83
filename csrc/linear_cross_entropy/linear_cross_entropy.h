// The middle of a linear layer's cross-entropy: the contract of the launcher.
//
// genkern/ops/linear_cross_entropy/op.py cuts the tokens into chunks and gives the logits of one
// chunk, which torch's GEMM has made. With z = logits, or softcap · tanh(logits / softcap),
// L = logsumexp(z), t the token's target and ε the label smoothing, over a vocabulary of V:
//
//   loss      = L - (1 - ε) z_t - ε/V · Σ_v z_v + z_loss · L²
//   gradient  = scale · (softmax(z)_v (1 + 2 z_loss L) - ε/V - (1 - ε)[v = t]) · dz_v/dlogit_v
//
// A token whose target is `ignored` has loss 0 and gradient 0. The gradient replaces the logits,
// ready for the GEMMs that make the layer's gradients of it.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

struct TokenLosses {
  void* logits;  // [tokens, vocabulary], contiguous
  int64_t tokens, vocabulary;
  const int64_t* targets;  // [tokens], each `ignored` or in [0, vocabulary)
  int64_t ignored;
  double label_smoothing, softcap, z_loss;  // softcap 0: none
  DType dtype;
  void* losses;        // [tokens], float (double for fp64)
  bool gradient;       // whether it replaces the logits
  const void* scales;  // [tokens], float (double for fp64), or null: scale, the same for all
  double scale;
  int threads;
};

GK_EACH_LEVEL(Status token_losses(const TokenLosses& args);)

}  // namespace genkern
