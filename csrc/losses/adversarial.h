// Adversarial losses: the contract of the launchers.
//
// A list of discriminators gives terms, each with real logits r and fake logits f of lengths of its
// own. Every loss here is one function φ and, for each side, a line: a sign s, a shift c, a weight
// w and a slope λ that is added beside φ (label smoothing):
//
//   separate:  w_r · mean(φ(s_r·r + c_r) + λ_r·r)  +  w_f · mean(φ(s_f·f + c_f) + λ_f·f)
//   paired:    w_r · mean φ(s_r·r + s_f·f + c_r)                (RpGAN; as many r as f)
//   average:   w_r · mean φ(s_r·(r - mean f) + c_r)  +  w_f · mean φ(s_f·(f - mean r) + c_f)
//
//   hinge D       φ = relu      r: s -1, c 1      f: s 1, c 1
//   vanilla D     φ = softplus  r: s -1           f: s 1            target 1 - ε: λ_r = ε
//   LSGAN D       φ = square    r: c -b           f: c -a
//   WGAN D        φ = identity  r: s -1           f: s 1
//
// times `factor`, summed over the terms. A generator's loss is the same with one side absent. All
// sums are fp32 (fp64 for fp64 logits), in fixed chunks, so the result does not depend on the
// number of threads.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

enum class Phi : int { softplus = 0, relu = 1, square = 2, identity = 3 };
enum class Pairing : int { separate = 0, paired = 1, average = 2 };

struct LogitLine {
  double sign, shift, weight, slope;  // slope: of separate sides only
};

struct AdversarialForm {
  Phi phi;
  Pairing pairing;
  double orientation;  // 1, or -1 where low logits mean real: for the statistics alone
  LogitLine real, fake;
};

struct LogitTerm {
  const void *real, *fake;         // contiguous
  int64_t real_count, fake_count;  // -1 where the side has no part in the loss
  void *grad_real, *grad_fake;     // in the logits' dtype, or null where not wanted
};

struct AdversarialForward {
  AdversarialForm form;
  DType dtype;
  double factor;
  const LogitTerm* terms;  // their gradients: dloss/dr, dloss/df
  int64_t count;
  void* loss;   // one float (double for fp64)
  void* stats;  // [4, count] of the same, or null: mean r, mean f, share r > 0, share f < 0
  int threads;
};

struct AdversarialBackward {
  AdversarialForm form;
  DType dtype;
  double factor;
  const LogitTerm* terms;
  int64_t count;
  const void* grad_loss;  // one float (double for fp64), multiplied in before rounding
  int threads;
};

GK_EACH_LEVEL(Status adversarial_forward(const AdversarialForward& args);
              Status adversarial_backward(const AdversarialBackward& args);)

#ifdef GK_HAVE_CUDA
namespace cuda {
struct ListPlan;  // common/lists.h
struct ListMemory;

// One launch for the whole list, two forward where means are subtracted. The plan of a forward, or
// with `gradients_alone` that of a backward, which has blocks for the gradients that are wanted.
// A forward writes the gradients too, for a grad_loss of 1, except where means are subtracted.
ListPlan adversarial_plan(Pairing pairing, DType dtype, const LogitTerm* terms, int64_t count,
                          bool gradients_alone, int64_t blocks_aim);

// `totals`: [2, 2 · count] where means are subtracted, else null; a forward leaves them. Of the
// args' terms only the number is used: the plan has them.
Status adversarial_forward(const AdversarialForward& args, const ListPlan& plan,
                           const ListMemory& memory, double* totals, void* stream);
// `is_done_for_one`: the gradients are a forward's, to be left as they are where grad_loss is 1.
Status adversarial_backward(const AdversarialBackward& args, const ListPlan& plan,
                            const ListMemory& memory, const double* totals, bool is_done_for_one,
                            void* stream);
}  // namespace cuda
#endif

}  // namespace genkern
