"""Spectral normalization of modules: one layer, or a whole model in one kernel call per forward.

Each normalised weight carries a parametrization with torch's state-dict keys (layer.py); with
recurse, hooks on the root normalise all of them together (model.py).
"""

from torch import nn

from genkern.nn.spectral_norm.layer import WARM_UP, SpectralNorm
from genkern.nn.spectral_norm.model import RECURSED, WholeModel, normalize_model
from genkern.nn.spectral_norm.registration import normalize_layer

__all__ = ["RECURSED", "WARM_UP", "SpectralNorm", "WholeModel", "spectral_norm"]


def spectral_norm(
    module,
    name="weight",
    n_power_iterations=1,
    eps=1e-12,
    dim=None,
    *,
    recurse=False,
    order="u_first",
):
    """Normalises `module`'s weight by its spectral norm; returns the module.

    A drop-in for `torch.nn.utils.parametrizations.spectral_norm`: Ŵ = W / σ(W), σ by the power
    method on u and v, two buffers: u ← W v / ‖W v‖, v ← Wᵀ u / ‖Wᵀ u‖, σ = u·(W v) (Miyato et al.
    2018). They start with 15 iterations, take `n_power_iterations` more whenever the weight is
    read in training mode, and stay as they are in eval mode. The state-dict keys are torch's.
    Unlike torch's, the module can be pickled, and an optimizer may step between forward and
    backward. Gradients of any order are right.

    module: an `nn.Module` with a float32, float64, bfloat16 or float16 parameter `name`; σ, u and v
        are computed in fp32 at least, under autocast too. A 1-D weight is divided by its norm.
    dim: the weight's dimension that counts its outputs: 1 for transposed convolutions, else 0.
    eps: the least norm that a vector is divided by.
    recurse: normalise every Linear, convolution of any kind, Embedding and Bilinear in `module`
        that is not normalised yet. All their weights are then normalised by one kernel call per
        forward of `module`, with one update of u and v however often a weight is read in it. A
        weight that is read outside of `module`'s forward is normalised alone.
    order: "v_first" takes the step as torch's legacy `torch.nn.utils.spectral_norm` does,
        v ← Wᵀ u / ‖Wᵀ u‖, u ← W v / ‖W v‖.

    Raises ValueError for a missing parameter, a non-positive n_power_iterations, another order, or
    a model with nothing to normalise; IndexError for a dim out of range; TypeError for another
    dtype.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"spectral_norm: module must be an nn.Module, not {type(module).__name__}")
    normalize = normalize_model if recurse else normalize_layer
    return normalize(module, name, n_power_iterations, eps, dim, order)
