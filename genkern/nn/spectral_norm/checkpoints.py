"""A forward that activation checkpointing repeats uses the weights of the one that it repeats.

torch.utils.checkpoint runs a region of a model again in the backward. There u and v must not move,
and Ŵ must be what it was, though other forwards may have moved u and v since. So what a region
reads is noted on torch's own object for that region, which lives as long as its graph: the vectors
that each normalization started from or, where Ŵ came from outside of the region, Ŵ itself (with
use_reentrant=True the vectors it was made with, as that mode differentiates what it repeats).

In a backward outside of any region known here u and v stay as they are.
"""

import inspect
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_graph_task = torch._C._current_graph_task_id
_NO_TASK = -1


class Start(NamedTuple):
    """What a normalization starts from; `update`: whether the new u and v are to be kept."""

    u: Tensor
    v: Tensor
    iterations: int
    update: bool


class _Notes:
    """What one region has read. Keys are parametrizations."""

    def __init__(self):
        self.starts = {}  # → a list, in the order of reading
        self.results = {}  # → (W, Ŵ)
        self._repetition = None
        self._taken = {}

    def next_start(self, parametrization, repetition):
        """What the forward started from here; a region may be repeated more than once."""
        if self._repetition != repetition:
            self._repetition, self._taken = repetition, {}
        starts = self.starts.get(parametrization)
        if starts is None:
            return None
        taken = self._taken.get(parametrization, 0)
        self._taken[parametrization] = taken + 1
        return starts[min(taken, len(starts) - 1)]


class _Region(NamedTuple):
    notes: _Notes
    reentrant: bool
    repetition: object  # None in the forward, else what tells one repetition from the next


def start(parametrization):
    """The `Start` of a normalization that is about to run."""
    moving = parametrization.iterations() > 0
    region = _region(moving)
    if region is not None and region.repetition is not None:
        noted = region.notes.next_start(parametrization, region.repetition)
        if noted is not None:
            return noted
    moving = moving and _graph_task() == _NO_TASK
    iterations = parametrization.iterations() if moving else 0
    if region is not None and parametrization.training:
        _note_start(region, parametrization, iterations)
    return Start(parametrization._u, parametrization._v, iterations, moving)


def note_result(parametrization, weight, normalized):
    """A region reads what was normalised before it began, or in it."""
    region = _region(parametrization.training)
    if region is None or region.repetition is not None:
        return
    if not region.reentrant:
        region.notes.results[parametrization] = weight, normalized
    elif parametrization not in region.notes.starts:
        _note_start(region, parametrization, 0)


def noted_result(parametrization, weight):
    """Ŵ, where a region is repeated that had it from outside; None otherwise."""
    region = _region(moving=False)
    if region is None or region.repetition is None:
        return None
    source, normalized = region.notes.results.get(parametrization, (None, None))
    return normalized if source is weight else None


def _note_start(region, parametrization, iterations):
    copies = parametrization._u.clone(), parametrization._v.clone()
    noted = Start(*copies, iterations, update=False)
    region.notes.starts.setdefault(parametrization, []).append(noted)


def _region(moving):
    """The innermost region that runs or is repeated now. `moving`: whether u and v would move, as
    only then it matters in a forward without gradients."""
    hooks = _top_hooks(True) if torch.is_grad_enabled() else None
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
        pack = inspect.unwrap(hooks[0])
        cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
        if "frame" in cells:
            return _Region(_notes_on(cells["frame"].cell_contents), False, None)
        if "target_frame_ref" in cells:
            return _Region(_notes_on(cells["target_frame_ref"].cell_contents()), False, pack)
    task = _graph_task()
    if task != _NO_TASK:
        context = _context_of(CheckpointFunction.backward.__code__)
        return None if context is None else _Region(_notes_on(context), True, task)
    if moving and not torch.is_grad_enabled():
        context = _context_of(CheckpointFunction.forward.__code__)
        return None if context is None else _Region(_notes_on(context), True, None)
    return None


def _context_of(code):
    """The autograd context of a running CheckpointFunction, which nothing but the stack knows."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None


def _notes_on(region):
    notes = getattr(region, "genkern_spectral_norm", None)
    if notes is None:
        notes = region.genkern_spectral_norm = _Notes()
    return notes
