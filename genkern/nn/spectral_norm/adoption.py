"""torch's spectral norms become genkern's, in place, and torch's again.

Parameters, u and v stay the same tensors, in the same order, so optimizers, DDP and shared weights
see no change. Both of torch's forms become the parametrization `SpectralNorm`: the legacy hook
(weight_orig, weight_u, weight_v) with order "v_first".
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as LegacyHook
from torch.nn.utils.spectral_norm import (
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)

from genkern.nn.spectral_norm.classes import class_before
from genkern.nn.spectral_norm.layer import SpectralNorm, normalization
from genkern.nn.spectral_norm.model import attach, detach
from genkern.nn.spectral_norm.registration import make_ours, unmake_ours
from genkern.ops._tensors import ARITHMETIC, is_plain

PARAMETRIZED, LEGACY = "parametrized", "legacy"


class Adopted(NamedTuple):
    """A spectral norm of torch's that was found.

    name: of its weight, as in `features.0.weight`. module: the layer that has the weight. form:
    "parametrized" or "legacy". reason: None where it was adopted, else why it was left as it is.
    """

    name: str
    module: nn.Module
    form: str
    reason: str | None = None

    @property
    def tensor_name(self):
        return self.name.rpartition(".")[2]


def adopt(root):
    """Turns every spectral norm of torch's in `root` into genkern's; gives a list of `Adopted`.

    Those with a reason were left. The others are normalised together from now on, by one kernel
    call per forward of `root` with one update of u and v, and by `release` given back.
    """
    found = [
        _examine(f"{prefix}.{name}" if prefix else name, module, form, theirs)
        for prefix, module in list(root.named_modules())
        for name, form, theirs in _spectral_norms(module)
    ]
    for adopted, theirs in found:
        if adopted.reason is None:
            take = _take_parametrized if adopted.form == PARAMETRIZED else _take_legacy
            take(adopted.module, adopted.tensor_name, theirs)
    weights = _weights(adopted for adopted, _ in found)
    if weights:
        attach(root, weights)
    return [adopted for adopted, _ in found]


def release(root, adopted):
    """Undoes `adopt`: each of its spectral norms is torch's again, in the form that it had, with
    the weights, u and v that it has now. One whose normalization was removed meanwhile is skipped.

    Raises ValueError, and changes nothing, for a weight that a parametrization was added to and
    that had torch's legacy form.
    """
    mine = [
        a
        for a in adopted
        if a.reason is None and normalization(a.module, a.tensor_name) is not None
    ]
    for one in mine:
        if one.form == LEGACY and len(one.module.parametrizations[one.tensor_name]) > 1:
            raise ValueError(
                f"spectral_norm: {one.name} has another parametrization since it was adopted, "
                f"which torch's legacy hook can't have: remove that first"
            )
    detach(root, _weights(adopted))
    for one in mine:
        give_back = _give_back_parametrized if one.form == PARAMETRIZED else _give_back_legacy
        give_back(one.module, one.tensor_name)


def _weights(adopted):
    return [(a.module, a.tensor_name) for a in adopted if a.reason is None]


# ---- What is there, and what can't be adopted ---------------------------------------------------


def _spectral_norms(module):
    """(name of the tensor, form, torch's object) of each."""
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():
            for parametrization in chain:
                if isinstance(parametrization, TorchParametrization):
                    yield name, PARAMETRIZED, parametrization
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, LegacyHook):
            yield hook.name, LEGACY, hook


def _examine(name, module, form, theirs):
    tensor_name = name.rpartition(".")[2]
    if form == PARAMETRIZED:
        weight = module.parametrizations[tensor_name]._parameters.get("original")
        if weight is None:
            weight = module.parametrizations[tensor_name]._buffers.get("original")
        vectors = theirs._buffers.values()
    else:
        weight = module._parameters.get(f"{tensor_name}_orig")
        vectors = [module._buffers.get(tensor_name + suffix) for suffix in ("_u", "_v")]
    reason = _why_not(module, tensor_name, theirs, weight, vectors)
    return Adopted(name, module, form, reason), theirs


def _why_not(module, name, theirs, weight, vectors):
    if type(theirs) not in (TorchParametrization, LegacyHook):
        return f"{type(theirs).__name__} is a class derived from torch's spectral norm"
    if isinstance(module, parametrize.ParametrizationList):
        return "it is a parametrization of a parametrization's own weight"
    if weight is None or any(vector is None for vector in vectors):
        return "its weight, u or v is made by something else"
    if parametrize.is_parametrized(module):
        if class_before(module) is None:
            return f"something has changed the layer's class to {type(module).__name__}"
        if name in module.parametrizations and len(module.parametrizations[name]) > 1:
            return "its weight has other parametrizations"
    for tensor in (weight, *vectors):
        if not is_plain(tensor):
            return (
                f"its weight, u or v is a {type(tensor).__name__} on {tensor.device}, not a plain "
                f"tensor on a CPU or a CUDA device"
            )
        if tensor.device != weight.device:
            return "its weight, u and v are on different devices"
    if weight.dtype not in ARITHMETIC:
        return f"its weight is {weight.dtype}"
    if any(v.dtype not in (weight.dtype, ARITHMETIC[weight.dtype]) for v in vectors):
        return f"its weight is {weight.dtype}, and its u or v is not"
    return None


# ---- torch's parametrization --------------------------------------------------------------------


def _take_parametrized(module, name, theirs):
    chain = module.parametrizations[name]
    ours = SpectralNorm(
        chain.original,
        getattr(theirs, "n_power_iterations", 1),  # a 1-D weight's has none
        theirs.dim,
        theirs.eps,
        vectors=tuple(theirs._buffers.values()),
    )
    chain[0] = ours.train(theirs.training)
    make_ours(module)


def _give_back_parametrized(module, name):
    chain = module.parametrizations[name]
    ours = chain[0]
    # Its constructor would draw random vectors.
    theirs = TorchParametrization.__new__(TorchParametrization)
    nn.Module.__init__(theirs)
    theirs.dim, theirs.eps = ours.dim, ours.eps
    if ours.has_vectors:
        theirs.n_power_iterations = ours.n_power_iterations
        theirs.register_buffer("_u", ours._u)
        theirs.register_buffer("_v", ours._v)
    chain[0] = theirs.train(ours.training)
    unmake_ours(module)


# ---- torch's legacy hook ------------------------------------------------------------------------


def _take_legacy(module, name, theirs):
    _remove_hooks(module, name)
    weight = getattr(module, f"{name}_orig")
    vectors = getattr(module, f"{name}_u"), getattr(module, f"{name}_v")
    for attribute in (name, f"{name}_orig", f"{name}_u", f"{name}_v"):
        delattr(module, attribute)
    module.register_parameter(name, weight)
    ours = SpectralNorm(
        weight, theirs.n_power_iterations, theirs.dim, theirs.eps, "v_first", vectors
    )
    # Checking the parametrization would call it, which in training moves u and v.
    parametrize.register_parametrization(module, name, ours, unsafe=True)
    module.parametrizations[name].unsafe = False
    make_ours(module)


def _remove_hooks(module, name):
    for hook_class, hooks in (
        (LegacyHook, module._forward_pre_hooks),
        (SpectralNormStateDictHook, module._state_dict_hooks),
        (SpectralNormLoadStateDictPreHook, module._load_state_dict_pre_hooks),
    ):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps some
            if isinstance(hook, hook_class) and getattr(hook, "fn", hook).name == name:
                del hooks[key]


def _give_back_legacy(module, name):
    ours = module.parametrizations[name][0]
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    weight = getattr(module, name)
    delattr(module, name)
    module.register_parameter(f"{name}_orig", weight)
    module.register_buffer(f"{name}_u", ours._u)
    module.register_buffer(f"{name}_v", ours._v)
    hook = LegacyHook(name, ours.n_power_iterations, ours.dim, ours.eps)
    with torch.no_grad():
        setattr(module, name, hook.compute_weight(module, do_power_iteration=False))
    module.register_forward_pre_hook(hook)
    module._register_state_dict_hook(SpectralNormStateDictHook(hook))
    module._register_load_state_dict_pre_hook(SpectralNormLoadStateDictPreHook(hook))
    unmake_ours(module)
