// Adversarial losses: the contract of the launchers.
//
// Every loss here is one function φ and, for each side (real logits r, fake logits f), three
// numbers:
//
//   separate:  loss = w_r · mean φ(s_r·r + c_r)  +  w_f · mean φ(s_f·f + c_f)
//   paired:    loss = w_r · mean φ(s_r·r + s_f·f + c_r)                (RpGAN; as many r as f)
//
//   hinge D     φ = relu      r: s -1, c 1      f: s 1, c 1
//   vanilla D   φ = softplus  r: s -1           f: s 1
//   LSGAN D     φ = square    r: c -b, w 1/2    f: c -a, w 1/2
//   WGAN D      φ = identity  r: s -1           f: s 1
//
// A generator's loss is the same with one side absent. All sums are fp32 (fp64 for fp64
// logits), in fixed chunks, so the result does not depend on the number of threads.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace genkern {

enum class Phi : int { softplus = 0, relu = 1, square = 2, identity = 3 };

struct LogitSide {
  const void* logits;  // contiguous
  int64_t count;       // -1 where the side has no part in the loss
  double sign, shift, weight;
};

struct AdversarialForward {
  Phi phi;
  DType dtype;
  bool paired;
  LogitSide real, fake;
  void* loss;       // one float (double for fp64)
  void* stats;      // four of the same, or null: mean r, mean f, share r > 0, share f < 0
  void* grad_real;  // dloss/dr in the logits' dtype, or null
  void* grad_fake;
  int threads;
};

struct AdversarialBackward {
  Phi phi;
  DType dtype;
  bool paired;
  LogitSide real, fake;
  const void* grad_loss;  // one float (double for fp64), multiplied in before rounding
  void* grad_real;        // or null where not wanted
  void* grad_fake;
  int threads;
};

GK_EACH_LEVEL(Status adversarial_forward(const AdversarialForward& args);
              Status adversarial_backward(const AdversarialBackward& args);)

#ifdef GK_HAVE_CUDA
namespace cuda {
// The forward gives no gradients here (the host cannot see whether grad_loss is 1 without waiting,
// so the backward computes them from the logits). `scratch`: so many bytes on the device.
constexpr int64_t adversarial_scratch_bytes = 512 * 6 * sizeof(double);
Status adversarial_forward(const AdversarialForward& args, void* scratch, void* stream);
Status adversarial_backward(const AdversarialBackward& args, void* stream);
}  // namespace cuda
#endif

}  // namespace genkern
