"""The arguments of spectral normalization, and what is said of bad ones."""

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from genkern.ops._tensors import ARITHMETIC
from genkern.ops.spectral_norm import reference

OP = "spectral_norm"
ORDER_NUMBER = {"u_first": 0, "v_first": 1}  # UpdateOrder of csrc/spectral_norm/spectral_norm.h


class Settings(NamedTuple):
    """`dims` and `iterations` hold one number a weight; 0 iterations use u and v as they are."""

    dims: tuple
    iterations: tuple
    eps: float
    order: str


def check_arguments(weights, us, vs, settings, cached):
    """Raises TypeError, ValueError or IndexError for bad arguments. `cached`: a model that has been
    found good is not looked at again (not with symbolic shapes, which can't be hashed)."""
    check = _check_once if cached else _check
    check(_described(weights), _described(us), _described(vs), settings)


def _described(tensors):
    """What `_check` looks at: hashable, and quick to make."""
    return tuple(
        [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in tensors]
    )


def _check(weights, us, vs, settings):
    """On arguments that are `_described`."""
    count = len(weights)
    if count == 0:
        raise ValueError(f"{OP}: weights must hold at least one tensor")
    for name, values in (
        ("us", us),
        ("vs", vs),
        ("dims", settings.dims),
        ("n_power_iterations", settings.iterations),
    ):
        if len(values) != count:
            raise ValueError(
                f"{OP}: {name} must hold one entry a weight, {count}, not {len(values)}"
            )
    if settings.order not in reference.ORDERS:
        raise ValueError(f"{OP}: order must be 'u_first' or 'v_first', not {settings.order!r}")
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        _check_weight(f"weights[{i}]", weight, weights[0])
        dim, iterations = settings.dims[i], settings.iterations[i]
        shape = weight[0]
        if not 0 <= dim < len(shape):
            raise IndexError(
                f"{OP}: dims[{i}] must be in [0, {len(shape) - 1}] for a weight of shape "
                f"{tuple(shape)}, not {dim}"
            )
        if iterations < 0:
            raise ValueError(f"{OP}: n_power_iterations[{i}] must be 0 or more, not {iterations}")
        _check_vector(f"us[{i}]", u, shape[dim], weight)
        _check_vector(f"vs[{i}]", v, math.prod(shape[:dim]) * math.prod(shape[dim + 1 :]), weight)


_check_once = lru_cache(maxsize=512)(_check)


def _check_weight(name, weight, first):
    if isinstance(weight, type):
        raise TypeError(f"{OP}: {name} must be a tensor, not {weight.__name__}")
    shape, dtype, device = weight
    if not dtype.is_floating_point:
        raise TypeError(f"{OP}: {name} must be of a floating-point dtype, not {dtype}")
    if len(shape) < 2:
        raise ValueError(
            f"{OP}: {name} must have 2 or more dimensions, not the shape {tuple(shape)}"
        )
    if dtype != first[1]:
        raise TypeError(f"{OP}: {name} must have weights[0]'s dtype, {first[1]}, not {dtype}")
    if device != first[2]:
        raise ValueError(f"{OP}: {name} must be on weights[0]'s device, {first[2]}, not {device}")


def _check_vector(name, vector, length, weight):
    if isinstance(vector, type):
        raise TypeError(f"{OP}: {name} must be a tensor, not {vector.__name__}")
    shape, dtype, device = vector
    if shape != (length,):
        raise ValueError(
            f"{OP}: {name} must have the shape ({length},) for a weight of shape "
            f"{tuple(weight[0])}, not {tuple(shape)}"
        )
    if dtype not in (weight[1], ARITHMETIC.get(weight[1])):
        raise TypeError(f"{OP}: {name} must have its weight's dtype, {weight[1]}, not {dtype}")
    if device != weight[2]:
        raise ValueError(f"{OP}: {name} must be on its weight's device, {weight[2]}, not {device}")
