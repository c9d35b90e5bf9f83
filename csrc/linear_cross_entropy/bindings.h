// The launchers of the cross-entropy of a linear layer under their Python names (bindings.cpp).
#pragma once

#include "../common/bindings.h"
#include "linear_cross_entropy.h"

namespace genkern {
namespace bindings {

inline void bind_linear_cross_entropy(py::module_& m) {
  m.def("token_losses", [](Address logits, int64_t tokens, int64_t vocabulary, Address targets,
                           int64_t ignored, double label_smoothing, double softcap, double z_loss,
                           int dtype, Address losses, bool gradient, Address scales, double scale,
                           int threads) {
    const TokenLosses args{
        pointer(logits), tokens,          vocabulary, static_cast<const int64_t*>(pointer(targets)),
        ignored,         label_smoothing, softcap,    z_loss,
        DType(dtype),    pointer(losses), gradient,   pointer(scales),
        scale,           threads};
    py::gil_scoped_release release;
    check(GK_PICK(token_losses)(args), "token_losses");
  });
}

}  // namespace bindings
}  // namespace genkern
