// Spectral normalization in CUDA: the contract of the launchers. What the lists hold:
// spectral_norm.h.
//
// The host plans a call: which blocks work on which layer. The plan is a table that the caller
// copies to the device. Kernels count in it, too, so every call needs a fresh copy of it.
#pragma once

#include <stdint.h>

#include <vector>

#include "spectral_norm.h"

namespace genkern {
namespace cuda {

// Rows, and columns, of a weight are fewer than this.
constexpr int64_t spectral_norm_longest = int64_t(1) << 30;

struct SpectralWork {
  std::vector<int64_t> table;
  int64_t scratch_bytes;  // on the device; needs no initial values
  DType dtype;
  double eps;
  int layers;
  int steps;           // forward: products, one after the other
  unsigned blocks[3];  // forward: of an even step, of an odd one, of the last launch; backward: of
                       // the inner products, of the gradients
};

SpectralWork spectral_norm_forward_work(const SpectralForward* list, int64_t count,
                                        const SpectralOptions& options);
SpectralWork spectral_norm_backward_work(const SpectralBackward* list, int64_t count,
                                         const SpectralOptions& options);

// `table` and `scratch` are on the device. `steps` + 1 launches, and 2.
Status spectral_norm_forward(const SpectralWork& work, void* table, void* scratch, void* stream);
Status spectral_norm_backward(const SpectralWork& work, void* table, void* scratch, void* stream);

}  // namespace cuda
}  // namespace genkern
