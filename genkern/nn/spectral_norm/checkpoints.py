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
from torch.utils.checkpoint import CheckpointFunction, checkpoint

# None in torch 2.6: there the stack alone tells.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_graph_task = torch._C._current_graph_task_id
_NO_TASK = -1
_CHECKPOINT_CODE = inspect.unwrap(checkpoint).__code__
_FILE = _CHECKPOINT_CODE.co_filename


class Start(NamedTuple):
    """What a normalization starts from; `update`: whether the new u and v are to be kept."""

    u: Tensor
    v: Tensor
    iterations: int
    update: bool


class Result(NamedTuple):
    """What the normalization of a weight gave, from which start."""

    weight: Tensor
    normalized: Tensor
    start: Start


class _Notes:
    """What one region has read. Keys are parametrizations."""

    def __init__(self):
        self.starts = {}  # → a list, in the order of reading
        self.results = {}  # → Result
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


def starts(parametrizations):
    """The `Start` of each of these, which are about to be normalised together."""
    iterations = [p.iterations() for p in parametrizations]
    regions = _regions(moving=any(iterations))
    if _graph_task() != _NO_TASK:
        iterations = [0] * len(iterations)
    stored = [
        Start(p._buffers["_u"], p._buffers["_v"], n, n > 0)
        for p, n in zip(parametrizations, iterations, strict=True)
    ]
    if not regions:
        return stored
    return [_start_in(regions, p, s) for p, s in zip(parametrizations, stored, strict=True)]


def _start_in(regions, parametrization, stored):
    start = None
    for region in regions:
        if region.repetition is not None and start is None:
            start = region.notes.next_start(parametrization, region.repetition)
    if start is None:
        start = stored
    if parametrization.training:
        _note_start(regions, parametrization, start)
    return start


def note_result(parametrization, result):
    """What was normalised before a region began, or in it, is read there."""
    regions = _regions(moving=parametrization.training)
    if not regions:
        return
    start = result.start
    if start.update:  # then u and v are now those that σ was computed with
        start = start._replace(iterations=0)
    for region in regions:
        if region.repetition is not None:
            continue
        if not region.reentrant:
            region.notes.results[parametrization] = result
        elif parametrization.training and parametrization not in region.notes.starts:
            _note_start([region], parametrization, start)


def noted_result(parametrization, weight):
    """Ŵ, where a region is repeated that had it from outside; None otherwise."""
    for region in _regions(moving=False):
        result = region.notes.results.get(parametrization)
        if region.repetition is not None and result is not None and result.weight is weight:
            return result.normalized
    return None


def _note_start(regions, parametrization, start):
    for region in regions:
        if region.repetition is None:
            u, v = start.u.clone(), start.v.clone()
            noted = Start(u, v, start.iterations, update=False)
            region.notes.starts.setdefault(parametrization, []).append(noted)


# ---- Which regions run --------------------------------------------------------------------------


def _regions(moving):
    """The regions that run or are repeated now, the innermost first. `moving`: whether u and v
    would move, as only then regions matter in a forward without gradients."""
    hooks = _top_hooks(True) if _top_hooks and torch.is_grad_enabled() else None
    innermost = None
    if hooks is not None and hooks[0].__module__ == checkpoint.__module__:
        innermost = _region_of_hook(inspect.unwrap(hooks[0]))
    elif (
        _top_hooks is not None
        and _graph_task() == _NO_TASK
        and (torch.is_grad_enabled() or not moving)
    ):
        return []
    regions = [] if innermost is None else [innermost]
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            region = _region_of_frame(frame.f_code, frame.f_locals)
            if region is not None and all(region.notes is not r.notes for r in regions):
                regions.append(region)
        frame = frame.f_back
    return regions


def _region_of_hook(pack):
    """Of the function that torch packs saved tensors with: in the forward and in the repetition."""
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    if "frame" in cells:
        return _Region(_notes_on(cells["frame"].cell_contents), False, None)
    if "target_frame_ref" in cells:
        notes = _notes_on(cells["target_frame_ref"].cell_contents())
        return _Region(notes, False, cells["gid"].cell_contents)
    return None


def _region_of_frame(code, variables):
    """Of one of torch.utils.checkpoint's functions that is on the stack."""
    if code is CheckpointFunction.forward.__code__:
        return _Region(_notes_on(variables["ctx"]), True, None)
    if code is CheckpointFunction.backward.__code__:
        return _Region(_notes_on(variables["ctx"]), True, _graph_task())
    if code.co_name == "unpack_hook" and "frame" in variables:
        return _Region(_notes_on(variables["frame"]), False, variables.get("gid"))
    generator = variables.get("gen") if code is _CHECKPOINT_CODE else None
    if generator is not None and generator.gi_frame is not None:
        frame = generator.gi_frame.f_locals.get("new_frame")
        return None if frame is None else _Region(_notes_on(frame), False, None)
    return None


def _notes_on(region):
    notes = getattr(region, "genkern_spectral_norm", None)
    if notes is None:
        notes = region.genkern_spectral_norm = _Notes()
    return notes
