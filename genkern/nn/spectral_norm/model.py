"""A whole model's weights normalised in one kernel call per forward.

Hooks on the root normalise all of them together before its forward, and leave the results where
the weights' readers look for them until that forward ends: nothing is kept for the next one,
because fused optimizers and `.data` change weights without a trace.
"""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from genkern.nn.spectral_norm import frames
from genkern.nn.spectral_norm.checkpoints import Result, starts
from genkern.nn.spectral_norm.layer import as_matrix, normalization
from genkern.nn.spectral_norm.registration import normalize_layer
from genkern.ops._tensors import is_plain
from genkern.ops.spectral_norm.blocks import Blocks
from genkern.ops.spectral_norm.op import spectral_norm as normalize

RECURSED = (nn.Linear, _ConvNd, nn.Embedding, nn.Bilinear)


def normalize_model(root, name, n_power_iterations, eps, dim, order):
    layers = [
        layer for layer in root.modules() if isinstance(layer, RECURSED) and _is_raw(layer, name)
    ]
    if not layers:
        raise ValueError(
            f"spectral_norm: module has no Linear, convolution, Embedding or Bilinear with a "
            f"{name!r} that is not normalised yet; it is a {type(root).__name__}"
        )
    for layer in layers:
        normalize_layer(layer, name, n_power_iterations, eps, dim, order)
    attach(root, [(layer, name) for layer in layers])
    return root


def _is_raw(layer, name):
    return name in layer._parameters and layer._parameters[name] is not None


def attach(root, weights):
    """From now on these weights, `(layer, name)`, are normalised together at `root`'s forward."""
    whole = WholeModel(weights)
    root.register_forward_pre_hook(whole.before)
    root.register_forward_hook(whole.after, always_call=True)


def detach(root, weights):
    """Undoes `attach` for these weights, whoever attached them to `root`."""
    gone = {(id(layer), name) for layer, name in weights}
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key, hook in list(hooks.items()):
            whole = getattr(hook, "__self__", None)
            if not isinstance(whole, WholeModel):
                continue
            whole.weights = [w for w in whole.weights if (id(w[0]), w[1]) not in gone]
            if not whole.weights:
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)


class WholeModel:
    """The hooks of a model whose `weights` are normalised together, before each forward."""

    def __init__(self, weights):
        self.weights = weights
        self.blocks = Blocks()
        self._compiled = (
            None  # the layers in compiled parts of the model, from the first forward on
        )

    def before(self, root, args):
        # The replicas of DataParallel are not the modules known here; under a compiler each layer
        # calls the library op.
        if torch.compiler.is_compiling() or getattr(root, "_is_replica", False):
            return
        if self._compiled is None:
            self._compiled = _layers_in_compiled_parts(root)
        results = {}
        for group in self._groups().values():
            weights, parametrizations = zip(*group, strict=True)
            begun = starts(parametrizations)
            us, vs, iterations, updates = zip(*begun, strict=True)
            normalized = normalize(
                [as_matrix(weight) for weight in weights],
                us,
                vs,
                [p.dim for p in parametrizations],
                n_power_iterations=iterations,
                eps=parametrizations[0].eps,
                order=parametrizations[0].order,
                update=any(updates),
                allocate=self.blocks.empty_like,
            ).weights
            for p, weight, new, s in zip(parametrizations, weights, normalized, begun, strict=True):
                results[p] = Result(weight, new if weight.ndim > 1 else new.squeeze(1), s)
        frames.enter(self, results)

    def after(self, root, args, output):
        if not torch.compiler.is_compiling():
            frames.leave(self)

    def _groups(self):
        """(W, parametrization) of all weights that can go together: of one dtype, device, eps and
        order."""
        groups = {}
        for layer, name in self.weights:
            p = normalization(layer, name)
            if p is None or not p.has_vectors or _is_cached(layer, name):
                continue
            if layer in self._compiled:  # it calls the library op itself
                continue
            weight = layer._modules["parametrizations"]._modules[name]._parameters.get("original")
            if weight is not None and is_plain(weight):
                key = weight.dtype, weight.device, p.eps, p.order
                groups.setdefault(key, []).append((weight, p))
        return groups


def _layers_in_compiled_parts(root):
    """Of `root.part = torch.compile(root.part)` and `root.part.compile()`."""
    parts = [
        part
        for part in root.modules()
        if part is not root and (part._compiled_call_impl or hasattr(part, "_orig_mod"))
    ]
    return {layer for part in parts for layer in part.modules()}


def _is_cached(layer, name):
    """Whether torch's own cache has it: inside `parametrize.cached()`, after a first reading."""
    return parametrize._cache_enabled and (id(layer), name) in parametrize._cache
