"""The weights that running forwards of whole models have normalised, until those forwards end."""

from contextvars import ContextVar
from typing import NamedTuple

import torch


class _Frame(NamedTuple):
    """What one running forward of one model has normalised: parametrization → `Result`."""

    owner: object
    results: dict
    outer: object  # the frame of the forward around this one, or None


# Per thread and task, not on the modules: a model may run in two threads at once, or call itself.
_frames = ContextVar("genkern_spectral_norm", default=None)


def enter(owner, results):
    _frames.set(_Frame(owner, results, _frames.get()))


def leave(owner):
    """Also called when the forward, or another hook ahead of `owner`'s, has failed."""
    frame = _frames.get()
    if frame is not None and frame.owner is owner:
        _frames.set(frame.outer)


def are_running():
    return _frames.get() is not None


def result_for(parametrization, weight):
    """Its `Result`, where a forward that is running has it; None otherwise. Not for compilers."""
    frame = _frames.get()
    while frame is not None:
        result = frame.results.get(parametrization)
        if result is not None and result.weight is weight:
            # A forward under no_grad may hold a block that wants gradients again.
            wanted = weight.requires_grad and torch.is_grad_enabled()
            return None if wanted and not result.normalized.requires_grad else result
        frame = frame.outer
    return None
