"""Spectral normalization of modules: one layer, or a whole model in one kernel call per forward.

Each normalised weight carries a parametrization with torch's state-dict keys. With recurse, hooks
on the root normalise all of them together before its forward, and leave the results where the
parametrizations look for them until that forward ends: nothing is kept for the next one, because
fused optimizers and `.data` change weights without a trace.
"""

from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from genkern.ops._tensors import is_plain
from genkern.ops.spectral_norm.blocks import Blocks
from genkern.ops.spectral_norm.op import spectral_norm as normalize

WARM_UP = 15
RECURSED = (nn.Linear, _ConvNd, nn.Embedding, nn.Bilinear)


def spectral_norm(
    module,
    name="weight",
    n_power_iterations=1,
    eps=1e-12,
    dim=None,
    *,
    recurse=False,
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

    Raises ValueError for a missing parameter, a non-positive n_power_iterations, or a model with
    nothing to normalise; IndexError for a dim out of range; TypeError for another dtype.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"spectral_norm: module must be an nn.Module, not {type(module).__name__}")
    if recurse:
        return _normalize_model(module, name, n_power_iterations, eps, dim)
    return _normalize_layer(module, name, n_power_iterations, eps, dim)


class SpectralNorm(nn.Module):
    """The parametrization W → W / σ(W), with buffers _u `[rows]` and _v `[cols]`."""

    def __init__(self, weight, n_power_iterations=1, dim=0, eps=1e-12):
        super().__init__()
        if not -weight.ndim <= dim < weight.ndim:
            raise IndexError(
                f"spectral_norm: dim must be in [{-weight.ndim}, {weight.ndim - 1}] for a weight "
                f"of shape {tuple(weight.shape)}, not {dim}"
            )
        if n_power_iterations <= 0:
            raise ValueError(
                f"spectral_norm: n_power_iterations must be positive, not {n_power_iterations}"
            )
        self.dim = dim % weight.ndim
        self.eps = eps
        self.n_power_iterations = n_power_iterations
        if weight.ndim > 1:
            rows = weight.shape[self.dim]
            cols = weight.numel() // rows if rows else weight[..., :0].numel()
            with torch.no_grad():
                for buffer, length in (("_u", rows), ("_v", cols)):
                    start = weight.new_empty(length).normal_(0, 1)
                    self.register_buffer(buffer, F.normalize(start, dim=0, eps=eps))
                self._normalize(weight, WARM_UP)

    def forward(self, weight):
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        ready = _result_for(self, weight)
        return self._normalize(weight, self.iterations()) if ready is None else ready

    def iterations(self):
        return self.n_power_iterations if self.training else 0

    def _normalize(self, weight, iterations):
        (normalized,) = normalize(
            [weight],
            [self._u],
            [self._v],
            [self.dim],
            n_power_iterations=iterations,
            eps=self.eps,
            update=iterations > 0,
        ).weights
        return normalized

    def right_inverse(self, value):
        return value

    def extra_repr(self):
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def _normalize_layer(module, name, n_power_iterations, eps, dim):
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"spectral_norm: module must have a parameter or buffer named {name!r}, and this "
            f"{type(module).__name__} has none"
        )
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(
            f"spectral_norm: module must have its weights, and this {type(module).__name__} is "
            f"lazy: run a forward first"
        )
    if dim is None:
        dim = 1 if isinstance(module, _ConvTransposeNd) else 0
    parametrization = SpectralNorm(weight, n_power_iterations, dim, eps)
    parametrize.register_parametrization(module, name, parametrization)
    _allow_pickle(module)
    return module


# ---- A whole model in one call ------------------------------------------------------------------


def _normalize_model(root, name, n_power_iterations, eps, dim):
    layers = [
        layer for layer in root.modules() if isinstance(layer, RECURSED) and _is_raw(layer, name)
    ]
    if not layers:
        raise ValueError(
            f"spectral_norm: module has no Linear, convolution, Embedding or Bilinear with a "
            f"{name!r} that is not normalised yet; it is a {type(root).__name__}"
        )
    for layer in layers:
        _normalize_layer(layer, name, n_power_iterations, eps, dim)
    whole = WholeModel(layers, name)
    root.register_forward_pre_hook(whole.before)
    root.register_forward_hook(whole.after, always_call=True)
    return root


def _is_raw(layer, name):
    return name in layer._parameters and layer._parameters[name] is not None


class _Frame(NamedTuple):
    """What one running forward of one model has normalised: parametrization → (W, Ŵ)."""

    owner: object
    results: dict
    outer: object  # the frame of the forward around this one, or None


# Per thread and task, not on the modules: a model may run in two threads at once, or call itself.
_frames = ContextVar("genkern_spectral_norm", default=None)


def _result_for(parametrization, weight):
    """Ŵ, where a forward that is running has it; None otherwise."""
    if torch.compiler.is_compiling():
        return None
    frame = _frames.get()
    while frame is not None:
        source, result = frame.results.get(parametrization, (None, None))
        if source is weight:
            # A forward under no_grad may hold a block that wants gradients again.
            lost = weight.requires_grad and torch.is_grad_enabled() and not result.requires_grad
            return None if lost else result
        frame = frame.outer
    return None


class WholeModel:
    """The hooks of a model whose `layers` are normalised together, before each forward."""

    def __init__(self, layers, name):
        self.layers = layers
        self.name = name
        self.blocks = Blocks()

    def before(self, root, args):
        # The replicas of DataParallel are not the modules known here; under a compiler each layer
        # calls the library op.
        if torch.compiler.is_compiling() or getattr(root, "_is_replica", False):
            return
        results = {}
        for group in self._groups().values():
            weights, parametrizations = zip(*group, strict=True)
            iterations = [p.iterations() for p in parametrizations]
            normalized = normalize(
                weights,
                [p._u for p in parametrizations],
                [p._v for p in parametrizations],
                [p.dim for p in parametrizations],
                n_power_iterations=iterations,
                eps=parametrizations[0].eps,
                update=any(iterations),
                allocate=self.blocks.empty_like,
            ).weights
            pairs = zip(weights, normalized, strict=True)
            results.update(zip(parametrizations, pairs, strict=True))
        _frames.set(_Frame(self, results, _frames.get()))

    def after(self, root, args, output):
        # Also called when the forward, or another pre-hook ahead of ours, has failed.
        if torch.compiler.is_compiling():
            return
        frame = _frames.get()
        if frame is not None and frame.owner is self:
            _frames.set(frame.outer)

    def _groups(self):
        """(W, parametrization) of all layers that can go together, by dtype, device and eps."""
        groups = {}
        for layer in self.layers:
            if not parametrize.is_parametrized(layer, self.name):
                continue
            chain = layer.parametrizations[self.name]
            weight, parametrization = getattr(chain, "original", None), chain[0]
            if isinstance(parametrization, SpectralNorm) and weight.ndim > 1 and is_plain(weight):
                key = weight.dtype, weight.device, parametrization.eps
                groups.setdefault(key, []).append((weight, parametrization))
        return groups


# ---- Pickle -------------------------------------------------------------------------------------


def _allow_pickle(module):
    """torch gives a parametrized module a class of its own that refuses to be pickled; here it
    says how to make that class again."""
    type(module).__reduce_ex__ = _reduce


def _reduce(module, protocol):
    base = type(module).__bases__[0]
    getstate = getattr(base, "__getstate__", object.__dict__.get("__getstate__"))
    if getstate is object.__dict__.get("__getstate__"):
        state = module.__dict__.copy()
    else:
        state = getstate(module)
    return _rebuild, (base, tuple(module.parametrizations)), state


def _rebuild(base, names):
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _allow_pickle(module)
    return module
