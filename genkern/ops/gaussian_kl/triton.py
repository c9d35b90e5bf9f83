"""KL divergence of diagonal Gaussians in Triton: one launch forward and one backward. The meaning
is csrc/gaussian_kl/gaussian_kl.h's.

Layout: all tensors are flat arrays in one order. Plan: a program takes a run of tiles
(ops/_triton_lists.py), and writes each element's KL or leaves their sum, which the last program to
arrive adds up. Backward, elementwise: grad_output is read on the device, one number or one an
element, and multiplied in before the one rounding. Floor: one read of the inputs forward, and
backward one read of the inputs and one write of the gradients.
"""

import torch
import triton
import triton.language as tl

from genkern.ops import _device, _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton_lists import (
    all_added_up,
    arrives_last,
    constants,
    leave,
    lists,
    load_tile,
    number,
    store_tile,
)

FACTOR = tl.constexpr(2)  # its place in the table


@triton.jit(do_not_specialize=["run"])
def forward_kernel(
    table,  # int64: counters, and what the sum is multiplied by
    partials,  # [programs] doubles, written and read by this launch alone
    mean,
    logvar,
    other_mean,  # anything where not HAS_OTHER
    other_logvar,
    result,  # of ARITHMETIC: one number, or with EACH as many as elements
    count,
    run,
    EACH: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TILE: tl.constexpr,
):
    total = tl.zeros([TILE], ARITHMETIC)
    start = tl.program_id(0).to(tl.int64) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, count), TILE):
        offsets = at + tl.arange(0, TILE)
        away = load_tile(mean, offsets, count, at, TILE).to(ARITHMETIC)
        difference = load_tile(logvar, offsets, count, at, TILE).to(ARITHMETIC)
        square = away * away
        if HAS_OTHER:
            away -= load_tile(other_mean, offsets, count, at, TILE).to(ARITHMETIC)
            k = load_tile(other_logvar, offsets, count, at, TILE).to(ARITHMETIC)
            difference -= k
            square = away * away * tl.exp(-k)
        term = 0.5 * (tl.exp(difference) + square - 1.0 - difference)
        if EACH:
            store_tile(result, offsets, term, count, at, TILE)
        else:
            total += tl.where(offsets < count, term, 0.0)
    if not EACH:
        leave(partials, 0, total)
        if arrives_last(table):
            everything = number(table, FACTOR) * all_added_up(partials, 0)
            tl.store(result, everything.to(ARITHMETIC))


@triton.jit(do_not_specialize=["run"])
def backward_kernel(
    table,
    mean,
    logvar,
    other_mean,
    other_logvar,
    grad_output,  # of ARITHMETIC: one number, or with EACH as many as elements
    grad_mean,  # this and the following: anything where not wanted
    grad_logvar,
    grad_other_mean,
    grad_other_logvar,
    count,
    run,
    EACH: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    WANTS_MEAN: tl.constexpr,
    WANTS_LOGVAR: tl.constexpr,
    WANTS_OTHER_MEAN: tl.constexpr,
    WANTS_OTHER_LOGVAR: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TILE: tl.constexpr,
):
    if not EACH:
        upstream = (number(table, FACTOR) * tl.load(grad_output).to(tl.float64)).to(ARITHMETIC)
    start = tl.program_id(0).to(tl.int64) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, count), TILE):
        offsets = at + tl.arange(0, TILE)
        away = load_tile(mean, offsets, count, at, TILE).to(ARITHMETIC)
        difference = load_tile(logvar, offsets, count, at, TILE).to(ARITHMETIC)
        slope = away
        if HAS_OTHER:
            away -= load_tile(other_mean, offsets, count, at, TILE).to(ARITHMETIC)
            k = load_tile(other_logvar, offsets, count, at, TILE).to(ARITHMETIC)
            difference -= k
            slope = away * tl.exp(-k)
        beyond = tl.exp(difference) - 1.0
        if EACH:
            upstream = load_tile(grad_output, offsets, count, at, TILE)
        if WANTS_MEAN:
            store_tile(grad_mean, offsets, upstream * slope, count, at, TILE)
        if WANTS_OTHER_MEAN:
            store_tile(grad_other_mean, offsets, -upstream * slope, count, at, TILE)
        half = 0.5 * upstream
        if WANTS_LOGVAR:
            store_tile(grad_logvar, offsets, half * beyond, count, at, TILE)
        if WANTS_OTHER_LOGVAR:
            of_other = -half * (beyond + away * slope)
            store_tile(grad_other_logvar, offsets, of_other, count, at, TILE)


# ---- Launchers ----------------------------------------------------------------------------------


def forward(tensors, factor):
    """The KL of mean, logvar and both of the other, or None, all in one order in memory: `factor`
    times their sum, or each where factor is None."""
    mean = tensors[0]
    with _device.on_device(mean):
        dtype = ARITHMETIC[mean.dtype]
        each = factor is None
        result = torch.empty_like(mean, dtype=dtype) if each else mean.new_empty((), dtype=dtype)
        plan, options = _plan(mean, factor)
        _triton.launch(
            forward_kernel,
            (plan.programs,),
            plan.table,
            mean.new_empty(plan.programs, dtype=torch.float64),
            *_given(tensors, mean),
            result,
            mean.numel(),
            plan.run,
            EACH=each,
            HAS_OTHER=tensors[2] is not None,
            **options,
        )
    return result


def backward(tensors, factor, grad_output, wanted):
    """The gradients of the tensors, None where not wanted. `grad_output`: one number, or one an
    element in the tensors' order where factor is None."""
    mean = tensors[0]
    with _device.on_device(mean):
        gradients = [torch.empty_like(mean) if want else None for want in wanted]
        plan, options = _plan(mean, factor)
        names = ("WANTS_MEAN", "WANTS_LOGVAR", "WANTS_OTHER_MEAN", "WANTS_OTHER_LOGVAR")
        _triton.launch(
            backward_kernel,
            (plan.programs,),
            plan.table,
            *_given(tensors, mean),
            grad_output,
            *_given(gradients, mean),
            mean.numel(),
            plan.run,
            EACH=factor is None,
            HAS_OTHER=tensors[2] is not None,
            **dict(zip(names, wanted, strict=True)),
            **options,
        )
    return gradients


def _plan(mean, factor):
    plan = lists([1.0 if factor is None else factor], [mean.numel()], [], [], mean.device)
    options = constants(mean, plan)
    return plan, {k: v for k, v in options.items() if k not in ("ELEMENT", "ALIGNMENT", "ARRAYS")}


def _given(tensors, instead):
    return [instead if x is None else x for x in tensors]
