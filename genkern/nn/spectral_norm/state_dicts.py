"""The three forms in which checkpoints hold normalised weights, turned into one another.

    parametrized   torch.nn.utils.parametrizations, genkern   parametrizations.weight.original,
                                                              parametrizations.weight.0._u, 0._v
    legacy         torch.nn.utils.spectral_norm               weight_orig, weight_u, weight_v
    biggan         BigGAN-PyTorch                             weight, u0, sv0

The first two use the stored u and v in eval mode, σ = u·(W v). BigGAN stores one vector, u0 [1,
rows], and takes the next step from it even in eval mode: v ← norm(Wᵀu0), u ← norm(W v), σ = ‖W v‖.
"""

import copy
import re
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genkern.nn.spectral_norm.layer import as_matrix, normalization
from genkern.ops._tensors import ARITHMETIC
from genkern.ops.spectral_norm import reference

FORMS = ("parametrized", "legacy", "biggan")
EPS = 1e-12  # what BigGAN divides by at least, by default


class _Weight(NamedTuple):
    """One normalised weight of a state dict."""

    prefix: str  # of its module: "features.0."
    name: str  # of the tensor in it: "weight"
    form: str


def convert_spectral_norm(state_dict, form):
    """A new state dict whose normalised weights are in `form`; other entries stay as they are.

    state_dict: of a model normalised by genkern, by torch (either way) or by BigGAN-PyTorch; the
        forms may be mixed. It is left as it is, and so are its tensors, which the result shares.
    form: "parametrized" (genkern's too), "legacy" or "biggan".

    In eval mode the weights are the same after conversion between the first two, and from "biggan":
    its u and v are those of the step that BigGAN takes itself. To "biggan", whose weights are
    normalised one step of the power method further on, u0 is u.

    Raises ValueError for another form, for BigGAN weights with more than one singular value, and
    where "biggan" can't hold a weight: one with another name than "weight", or whose rows are not
    its dimension 0.
    """
    if form not in FORMS:
        raise ValueError(
            f"convert_spectral_norm: form must be 'parametrized', 'legacy' or 'biggan', "
            f"not {form!r}"
        )
    weights = {key: weight for weight in _find(state_dict) for key in _keys(weight)}
    result = OrderedDict()
    for key, value in state_dict.items():
        weight = weights.get(key)
        if weight is None or weight.form == form:
            result[key] = value
        elif key == _keys(weight)[0]:
            result.update(_convert(state_dict, weight, form))
    if hasattr(state_dict, "_metadata"):
        result._metadata = copy.deepcopy(state_dict._metadata)
    return result


def translate_on_load(module, state_dict, prefix, *_):
    """A load_state_dict pre-hook of a module normalised by genkern: takes weights of any form."""
    for name in getattr(module, "parametrizations", ()):
        ours = normalization(module, name)
        if ours is None:
            continue
        source = next((w for w in _forms_of(prefix, name) if _is_in(state_dict, w)), None)
        if source is not None:
            new = _convert(state_dict, source, "parametrized", ours.dim, ours.eps)
            for key in _keys(source):
                state_dict.pop(key, None)
            state_dict.update(new)
        weight, u, v = _keys(_Weight(prefix, name, "parametrized"))
        if not ours.has_vectors:
            state_dict.pop(u, None), state_dict.pop(v, None)
        elif weight in state_dict and u not in state_dict and state_dict[weight].ndim == 1:
            vector = state_dict[weight]
            state_dict[u] = F.normalize(vector, dim=0, eps=ours.eps)
            state_dict[v] = vector.new_ones(1)


# ---- Finding them -------------------------------------------------------------------------------

_VECTOR_KEYS = {
    "parametrized": re.compile(r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.0\._u"),
    "legacy": re.compile(r"(?P<prefix>(?:.*\.)?)(?P<name>[^.]+)_u"),
    "biggan": re.compile(r"(?P<prefix>(?:.*\.)?)u0"),
}


def _find(state_dict):
    for key in state_dict:
        for form, pattern in _VECTOR_KEYS.items():
            match = pattern.fullmatch(key)
            if match is None:
                continue
            weight = _Weight(match["prefix"], match.groupdict().get("name", "weight"), form)
            if _is_in(state_dict, weight):
                yield weight
                break


def _forms_of(prefix, name):
    """How a weight may be called, other than genkern calls it."""
    yield _Weight(prefix, name, "legacy")
    if name == "weight":
        yield _Weight(prefix, name, "biggan")


def _keys(weight):
    """Of W, u and v, in that order; for BigGAN of W, u0 and sv0."""
    prefix, name, form = weight
    if form == "parametrized":
        start = f"{prefix}parametrizations.{name}."
        return f"{start}original", f"{start}0._u", f"{start}0._v"
    if form == "legacy":
        return tuple(f"{prefix}{name}{suffix}" for suffix in ("_orig", "_u", "_v"))
    return f"{prefix}{name}", f"{prefix}u0", f"{prefix}sv0"


def _is_in(state_dict, weight):
    return all(isinstance(state_dict.get(key), Tensor) for key in _keys(weight))


# ---- Turning one into another -------------------------------------------------------------------


def _convert(state_dict, weight, form, dim=0, eps=EPS):
    """The entries of one weight in another form."""
    tensors = [state_dict[key] for key in _keys(weight)]
    if weight.form == "biggan":
        if f"{weight.prefix}u1" in state_dict:
            raise ValueError(
                f"convert_spectral_norm: {weight.prefix}u1 is there: BigGAN's form is known with "
                f"one singular value a weight only"
            )
        tensors = _from_biggan(*tensors, dim, eps)
    if form == "biggan":
        _check_biggan(weight, *tensors)
        tensors = _to_biggan(*tensors)
    keys = _keys(weight._replace(form=form))
    if form == "parametrized" and tensors[0].ndim == 1:
        keys = keys[:1]  # torch's parametrization divides a 1-D weight by its norm
    return dict(zip(keys, tensors, strict=False))


def _from_biggan(weight, u0, sv0, dim, eps):
    matrix = _wide_matrix(weight, dim)
    u, v = reference.power_iterations(
        matrix, u0.flatten().to(matrix.dtype), None, 1, eps, order="v_first"
    )
    return weight, u.to(weight.dtype), v.to(weight.dtype)


def _to_biggan(weight, u, v):
    matrix = _wide_matrix(weight, 0)
    sigma = torch.dot(u.to(matrix.dtype), matrix @ v.to(matrix.dtype))
    return weight, u[None], sigma.to(weight.dtype).reshape(1)


def _wide_matrix(weight, dim):
    wide = weight.detach().to(ARITHMETIC.get(weight.dtype, weight.dtype))
    return reference.as_matrix(as_matrix(wide), dim)


def _check_biggan(weight, tensor, u, v):
    where = f"{weight.prefix}{weight.name}"
    if weight.name != "weight":
        raise ValueError(
            f"convert_spectral_norm: BigGAN's form normalises tensors named 'weight' only, "
            f"not {where}"
        )
    if u.numel() != tensor.shape[0] or v.numel() * u.numel() != tensor.numel():
        raise ValueError(
            f"convert_spectral_norm: BigGAN's form takes dimension 0 as the rows, and {where} of "
            f"shape {tuple(tensor.shape)} has a u of {u.numel()} elements"
        )
