"""Mean differences of pairs of tensors in Triton: a list of pairs in one launch forward and one
backward. The meaning is csrc/differences/differences.h's.

Layout: an array is one pair, read together; how arrays become programs, and programs' sums one sum:
ops/_triton_lists.py. Plan of the forward: a program leaves its part of weight · mean φ(a - b), and
the last to arrive adds up all parts. Backward, elementwise: grad_loss is read on the device and
multiplied in before the one rounding. Floor: one read of both tensors forward, one read and one
write of both backward.
"""

import math

import torch
import triton
import triton.language as tl

from genkern.ops import _device, _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton_lists import (
    all_added_up,
    array_of,
    arrives_last,
    at_address,
    constants,
    leave,
    lists,
    load_tile,
    number,
    store_tile,
)

# Places of the number and of the firsts, behind which the columns are, in the table.
NOTHING = tl.constexpr(2)
FIRSTS = tl.constexpr(3)


@triton.jit(do_not_specialize=["run"])
def forward_kernel(
    table,  # int64: see `_table`
    partials,  # [programs] doubles, written and read by this launch alone
    loss,  # one number of ARITHMETIC
    run,
    DISTANCE: tl.constexpr,
    ELEMENT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    firsts = table + FIRSTS
    array = array_of(firsts, program, ARRAYS)
    columns = firsts + ARRAYS + 1 + array
    a = at_address(columns, ELEMENT, ALIGNMENT)
    b = at_address(columns + ARRAYS, ELEMENT, ALIGNMENT)
    count = tl.load(columns + 4 * ARRAYS)
    total = tl.zeros([TILE], ARITHMETIC)
    start = (program - tl.load(firsts + array)) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, count), TILE):
        offsets = at + tl.arange(0, TILE)
        difference = load_tile(a, offsets, count, at, TILE).to(ARITHMETIC)
        difference -= load_tile(b, offsets, count, at, TILE).to(ARITHMETIC)  # zero beyond the end
        if DISTANCE == "absolute":
            total += tl.abs(difference)
        else:
            total += difference * difference
    leave(partials, 0, total.to(tl.float64) * number(columns, 5 * ARRAYS))
    if arrives_last(table):
        everything = all_added_up(partials, 0) + number(table, NOTHING)
        tl.store(loss, everything.to(ARITHMETIC))


@triton.jit(do_not_specialize=["run"])
def backward_kernel(
    table,
    grad_loss,  # one number of ARITHMETIC
    run,
    DISTANCE: tl.constexpr,
    ELEMENT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    firsts = table + FIRSTS
    array = array_of(firsts, program, ARRAYS)
    columns = firsts + ARRAYS + 1 + array
    a = at_address(columns, ELEMENT, ALIGNMENT)
    b = at_address(columns + ARRAYS, ELEMENT, ALIGNMENT)
    grad_a = at_address(columns + 2 * ARRAYS, ELEMENT, ALIGNMENT)
    grad_b = at_address(columns + 3 * ARRAYS, ELEMENT, ALIGNMENT)
    count = tl.load(columns + 4 * ARRAYS)
    upstream = tl.load(grad_loss).to(tl.float64) * number(columns, 5 * ARRAYS)
    factor = (upstream if DISTANCE == "absolute" else 2 * upstream).to(ARITHMETIC)
    start = (program - tl.load(firsts + array)) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, count), TILE):
        offsets = at + tl.arange(0, TILE)
        slope = load_tile(a, offsets, count, at, TILE).to(ARITHMETIC)
        slope -= load_tile(b, offsets, count, at, TILE).to(ARITHMETIC)
        if DISTANCE == "absolute":  # the sign, zero of NaN as torch's
            slope = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, 0.0)).to(ARITHMETIC)
        gradient = slope * factor
        if grad_a.to(tl.int64) != 0:
            store_tile(grad_a, offsets, gradient, count, at, TILE)
        if grad_b.to(tl.int64) != 0:
            store_tile(grad_b, offsets, -gradient, count, at, TILE)


def forward(distance, weights, tensors):
    """The loss of dense tensors: the first half against the second, in the same order."""
    first = tensors[0]
    with _device.on_device(first):
        loss = first.new_empty((), dtype=ARITHMETIC[first.dtype])
        plan = _table(weights, tensors)
        partials = first.new_empty(plan.programs, dtype=torch.float64)
        _triton.launch(
            forward_kernel,
            (plan.programs,),
            plan.table,
            partials,
            loss,
            plan.run,
            DISTANCE=distance,
            **constants(first, plan),
        )
    return loss


def backward(distance, weights, tensors, grad_loss, gradients):
    """Fills the gradients (None where not wanted), which lie as their tensors do."""
    with _device.on_device(tensors[0]):
        plan = _table(weights, tensors, gradients)
        _triton.launch(
            backward_kernel,
            (plan.programs,),
            plan.table,
            grad_loss,
            plan.run,
            DISTANCE=distance,
            **constants(tensors[0], plan),
        )


def _table(weights, tensors, gradients=None):
    """Number: what pairs of nothing add, NaN as in PyTorch. Columns: addresses of a, b and their
    gradients, counts, weight / count."""
    pairs = len(weights)
    arrays = triton.next_power_of_2(pairs)

    def filled(column):
        return [*column, *[0] * (arrays - pairs)]

    counts = [x.numel() for x in tensors[:pairs]]
    scales = [w / n if n else 0.0 for w, n in zip(weights, counts, strict=True)]
    work = counts
    addresses = [x.data_ptr() for x in tensors]
    grads = [0 if g is None else g.data_ptr() for g in gradients or [None] * len(tensors)]
    if gradients is not None:
        both = zip(counts, grads[:pairs], grads[pairs:], strict=True)
        work = [n if a or b else 0 for n, a, b in both]
    sides = [filled(x) for both in (addresses, grads) for x in (both[:pairs], both[pairs:])]
    nothing = 0.0 if all(counts) else math.nan
    columns = [filled(counts), filled(scales)]
    return lists([nothing], filled(work), sides, columns, tensors[0].device)
