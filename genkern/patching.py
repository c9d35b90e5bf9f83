"""`genkern.patch(model)`: genkern's operations in a model that was written with torch's.

A model is changed in place and keeps its modules, parameters and buffers, so optimizers and hooks
stay valid. What was done is written down in the model itself, for `unpatch`.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genkern.nn import MultiheadAttention, register_with_transformers
from genkern.nn.spectral_norm.adoption import adopt, release
from genkern.nn.spectral_norm.layer import normalization
from genkern.ops import _triton
from genkern.redirect import Redirection, restore_class, scaled_dot_product_attention

RECORD = "_genkern_patched"
TRANSFORMERS_NAME = "genkern"


class Change(NamedTuple):
    """One thing that was changed: `what` it is ("spectral norm", "attention"), the module's name
    in the model, and how it was done."""

    what: str
    name: str
    how: str


class Left(NamedTuple):
    """One thing that was left as it is, and why."""

    name: str
    why: str


@dataclass
class Patched:
    """What `patch` did. spectral_calls: how many kernel calls normalise all weights in a forward of
    the model: one for each dtype, order and eps. str() of it is what `patch` prints."""

    model: nn.Module
    changed: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    spectral_calls: int = 0
    undo: list = field(default_factory=list, repr=False)  # (function, arguments), in order

    def __str__(self):
        counts = Counter(change.what for change in self.changed)
        parts = []
        if norms := counts["spectral norm"]:
            calls = _counted(self.spectral_calls, "call")
            parts.append(f"{_counted(norms, 'spectral norm')} → {calls}")
        if attentions := counts["attention"]:
            parts.append(f"{_counted(attentions, 'attention')} fused")
        lines = [f"genkern.patch: {', '.join(parts) or 'nothing to change'}"]
        lines += [f"  left: {name or 'the model'}: {why}" for name, why in self.left]
        return "\n".join(lines)


def _counted(number, what):
    return f"{number} {what}{'' if number == 1 else 's'}"


def patch(model, *, spectral_norm=True, attention=True, verbose=True):
    """Puts genkern's operations where `model` has torch's, in place; prints and returns what it
    changed, what it left, and why: a `Patched`.

        genkern.patch(D)       # genkern.patch: 23 spectral norms → 1 call, 2 attentions fused
        genkern.unpatch(D)

    spectral_norm: torch's spectral norms, of `parametrizations` and of the older hook, become one
        kernel call per forward of `model`. Weights (the same Parameter objects), u and v, their
        order of update and n_power_iterations are kept. State dicts of either form still load;
        those of the older hook are saved as the newer one's.
    attention: every `nn.MultiheadAttention` becomes `genkern.nn.MultiheadAttention`. It stores the
        weights that a caller asks for, and torch asks by default: need_weights=False is fused.
        Methods of modules and of their `processor` (diffusers) that call
        F.scaled_dot_product_attention call `genkern.attention`, as do the functions of the same
        package which they call. Models of transformers are given
        `attn_implementation="genkern"`.
    verbose: whether to print.

    Left are, among others, attention that is written out as matrix products, that scripted modules
    call, or that is on a device without an attention kernel.

    Raises TypeError unless `model` is a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be an nn.Module, not {type(model).__name__}")
    done = Patched(model)
    if spectral_norm:
        _patch_spectral_norms(model, done)
    if attention:
        _patch_attention(model, done)
    # Beside what earlier calls did; not as a module's attribute, which may be a parameter's.
    vars(model).setdefault(RECORD, []).extend(done.undo)
    if verbose:
        print(done)
    return done


def unpatch(model):
    """Undoes all that `patch` did to `model`, in place, and returns it. Weights, u and v stay as
    they are now. Does nothing to a model that was not patched."""
    for function, *arguments in reversed(vars(model).pop(RECORD, [])):
        function(*arguments)
    return model


# ---- Spectral norms -----------------------------------------------------------------------------


def _patch_spectral_norms(model, done):
    found = adopt(model)
    for one in found:
        if one.reason is None:
            done.changed.append(Change("spectral norm", one.name, f"was torch's {one.form} form"))
        else:
            done.left.append(Left(one.name, one.reason))
    ours = [normalization(x.module, x.tensor_name) for x in found if x.reason is None]
    done.spectral_calls = len({(x._u.dtype, x.order, x.eps) for x in ours if x.has_vectors})
    if ours:
        done.undo.append((release, model, found))


# ---- Attention ----------------------------------------------------------------------------------


def _patch_attention(model, done):
    devices = {x.device.type for x in model.parameters()} - {"cpu"}
    problem = _triton.problem() if devices == {"cuda"} else "there are no kernels for it"
    if devices and problem:
        why = f"its attention is on {', '.join(sorted(devices))}: {problem}"
        done.left.append(Left("", why))
        return
    _patch_transformers(model, done)
    redirection = Redirection()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            done.left.append(Left(name, "a scripted module keeps its own code"))
        elif isinstance(module, nn.MultiheadAttention):
            _patch_multihead(name, module, done)
        else:
            _redirect(name, module, module, redirection, done)
            _patch_attributes(name, module, redirection, done)


def _patch_multihead(name, module, done):
    if type(module) is nn.MultiheadAttention:
        module.__class__ = MultiheadAttention
        done.changed.append(Change("attention", name, "nn.MultiheadAttention"))
        done.undo.append((setattr, module, "__class__", nn.MultiheadAttention))
    elif not isinstance(module, MultiheadAttention):
        kind = type(module).__name__
        done.left.append(Left(name, f"{kind} is a subclass of nn.MultiheadAttention"))


def _patch_attributes(name, module, redirection, done):
    """A function that the module keeps as an attribute, and diffusers' processor."""
    for key, value in list(vars(module).items()):
        if value is F.scaled_dot_product_attention:
            setattr(module, key, scaled_dot_product_attention)
            done.changed.append(Change("attention", name, f"its attribute {key}"))
            done.undo.append((setattr, module, key, value))
    processor = vars(module).get("processor")
    if callable(processor):
        _redirect(f"{name}.processor", processor, module, redirection, done)


def _redirect(name, obj, module, redirection, done):
    found = redirection.of_class(type(obj))
    done.left += [Left(name, f"{where}: {why}") for where, why in found.left]
    if found.result is None:
        return
    if hasattr(module, "parametrizations"):
        done.left.append(Left(name, "its own weights are parametrized, which makes its class"))
        return
    if redirection.of_object(obj).result is not None:
        done.changed.append(Change("attention", name, "scaled_dot_product_attention"))
        done.undo.append((restore_class, obj))


def _patch_transformers(model, done):
    library = sys.modules.get("transformers")
    if library is None:
        return
    models = [m for m in model.named_modules() if isinstance(m[1], library.PreTrainedModel)]
    for name, module in models:
        if any(name.startswith(f"{outer}.") or outer == "" != name for outer, _ in models):
            continue  # the outer one sets it for all below
        before = module.config._attn_implementation
        try:
            register_with_transformers(TRANSFORMERS_NAME)
            module.set_attn_implementation(TRANSFORMERS_NAME)
        except (ImportError, ValueError) as error:
            done.left.append(Left(name, f"transformers: {error}"))
            continue
        layers = [n for n, m in module.named_modules() if hasattr(m, "is_causal")]
        for layer in layers:
            done.changed.append(Change("attention", f"{name}.{layer}".strip("."), "transformers"))
        done.undo.append((module.set_attn_implementation, before))
