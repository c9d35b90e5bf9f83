"""Norms of samples in Triton: all groups of all items in one launch forward and one backward. The
meaning is csrc/sample_norms/sample_norms.h's.

Layout: an array is one item, of rows that are samples; how rows become programs: _triton_lists.py.
Plan of the forward: a program leaves the sum of squares of its piece of one sample; the last to
arrive adds the pieces up sample by sample, in order, keeps the samples' sums and makes the value of
them. Backward, elementwise: a program makes its sample's factor of the sums and of grad_value, read
on the device, and multiplies. Floor: one read forward, one read and one write backward.
"""

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl

from genkern.ops import _device, _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton_lists import (
    LANES,
    TILE,
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

# Places of the numbers and of the firsts, behind which the columns are, in the table.
CENTER = tl.constexpr(2)
WEIGHT = tl.constexpr(3)
NOTHING = tl.constexpr(4)
FIRSTS = tl.constexpr(5)
# Columns by item, then by group.
NUMBERS = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
SIZE = tl.constexpr(2)
STRIDE = tl.constexpr(3)
FIRST_SUM = tl.constexpr(4)  # of its group
SAMPLES = tl.constexpr(5)
SHARE = tl.constexpr(6)  # 1 / samples
FIRST_ITEM = tl.constexpr(7)
END_ITEM = tl.constexpr(8)
GROUP_SUM = tl.constexpr(9)
GROUP_SAMPLES = tl.constexpr(10)
GROUP_SHARE = tl.constexpr(11)


@triton.jit
def pieces_of(size, run, TILE: tl.constexpr):
    """Programs of one sample."""
    return tl.cdiv(tl.cdiv(size, TILE), run)


@triton.jit
def is_largest(s, largest):
    """Whether a sample has the largest sum; a NaN is the largest, as in PyTorch."""
    return (s == largest) | (s != s)


@triton.jit
def largest_of(sums, samples, LANES: tl.constexpr):
    """(the largest sum, NaN if any is, and how many are so large)"""
    lanes = tl.arange(0, LANES)
    largest = tl.full([LANES], -1.0, tl.float64)
    strange = tl.zeros([LANES], tl.float64)
    for at in range(0, samples, LANES):
        s = tl.load(sums + at + lanes, mask=at + lanes < samples, other=-1.0)
        strange += tl.where(s != s, s, 0.0)
        largest = tl.where(s > largest, s, largest)
    largest = tl.max(largest, 0) + tl.sum(strange, 0)
    equal = tl.zeros([LANES], tl.int32)
    for at in range(0, samples, LANES):
        s = tl.load(sums + at + lanes, mask=at + lanes < samples, other=-1.0)
        equal += is_largest(s, largest).to(tl.int32)
    return largest, tl.sum(equal, 0)


@triton.jit(do_not_specialize=["groups", "run"])
def forward_kernel(
    table,  # int64: see `_table`
    partials,  # [programs] doubles, written and read by this launch alone
    sums,  # doubles: of the samples of all groups
    value,  # of ARITHMETIC: one number, or of squares as many as sums
    groups,
    run,
    FUNCTION: tl.constexpr,
    WIDTH: tl.constexpr,  # pieces of a sample that are read at a time
    ELEMENT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    firsts = table + FIRSTS
    item = array_of(firsts, program, ARRAYS)
    columns = firsts + ARRAYS + 1 + item
    size = tl.load(columns + SIZE * ARRAYS)
    pieces = tl.maximum(pieces_of(size, run, TILE), 1)
    place = program - tl.load(firsts + item)
    sample = place // pieces
    row = at_address(columns + NUMBERS * ARRAYS, ELEMENT, ALIGNMENT)
    row = tl.multiple_of(row + sample * tl.load(columns + STRIDE * ARRAYS), ALIGNMENT)
    total = tl.zeros([TILE], ARITHMETIC)
    start = (place % pieces) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, size), TILE):
        x = load_tile(row, at + tl.arange(0, TILE), size, at, TILE).to(ARITHMETIC)
        total += x * x  # zero beyond the end
    leave(partials, 0, total)
    if arrives_last(table):
        finish(table, partials, sums, value, groups, run, FUNCTION, WIDTH, ARITHMETIC, ARRAYS, TILE)


@triton.jit
def finish(
    table,
    partials,
    sums,
    value,
    groups,
    run,
    FUNCTION: tl.constexpr,
    WIDTH: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The programs' sums become the samples', and those the value."""
    HEIGHT: tl.constexpr = LANES // WIDTH
    firsts = table + FIRSTS
    columns = firsts + ARRAYS + 1
    center = number(table, CENTER)
    total = number(table, NOTHING)
    for group in range(0, groups):
        first = tl.load(columns + GROUP_SUM * ARRAYS + group)
        samples = tl.load(columns + GROUP_SAMPLES * ARRAYS + group)
        first_item = tl.load(columns + FIRST_ITEM * ARRAYS + group)
        end_item = tl.load(columns + END_ITEM * ARRAYS + group)
        terms = tl.zeros([HEIGHT], tl.float64)
        for at in range(0, samples, HEIGHT):
            sample = at + tl.arange(0, HEIGHT)
            live = sample < samples
            s = tl.zeros([HEIGHT], tl.float64)
            for item in range(first_item, end_item):
                pieces = pieces_of(tl.load(columns + SIZE * ARRAYS + item), run, TILE)
                entries = partials + tl.load(firsts + item) + sample * pieces
                parts = tl.zeros([HEIGHT, WIDTH], tl.float64)
                for part in range(0, pieces, WIDTH):
                    piece = part + tl.arange(0, WIDTH)[None, :]
                    wanted = live[:, None] & (piece < pieces)
                    parts += tl.load(entries[:, None] + piece, mask=wanted, other=0.0)
                s += tl.sum(parts, 1)
            tl.store(sums + first + sample, s, mask=live)
            if FUNCTION == "squares":
                tl.store(value + first + sample, s.to(ARITHMETIC), mask=live)
            elif FUNCTION == "square":
                terms += s
            elif FUNCTION != "largest":
                beyond = tl.sqrt(s) - center
                if FUNCTION == "excess":
                    beyond = tl.where(beyond <= 0, 0.0, beyond)
                terms += tl.where(live, beyond * beyond, 0.0)
        if FUNCTION == "largest":
            tl.debug_barrier()  # the sums are there for all threads
            largest, _ = largest_of(sums + first, samples, LANES)
            total += largest
        else:
            total += tl.sum(terms, 0) * number(columns + GROUP_SHARE * ARRAYS, group)
    if FUNCTION != "squares":
        tl.store(value, (number(table, WEIGHT) * total).to(ARITHMETIC))


@triton.jit(do_not_specialize=["run"])
def backward_kernel(
    table,
    sums,  # as the forward has left them
    grad_value,  # of ARITHMETIC: one number, or of squares as many as sums
    run,
    FUNCTION: tl.constexpr,
    ELEMENT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    firsts = table + FIRSTS
    item = array_of(firsts, program, ARRAYS)
    columns = firsts + ARRAYS + 1 + item
    size = tl.load(columns + SIZE * ARRAYS)
    pieces = tl.maximum(pieces_of(size, run, TILE), 1)
    place = program - tl.load(firsts + item)
    sample = place // pieces
    row = at_address(columns + NUMBERS * ARRAYS, ELEMENT, ALIGNMENT)
    row = tl.multiple_of(row + sample * tl.load(columns + STRIDE * ARRAYS), ALIGNMENT)
    gradient = at_address(columns + GRADIENT * ARRAYS, ELEMENT, ALIGNMENT)
    gradient = tl.multiple_of(gradient + sample * size, ALIGNMENT)

    # A sample's factor: of an item without samples, whose sums are not there, nothing.
    sums += tl.load(columns + FIRST_SUM * ARRAYS)
    samples = tl.load(columns + SAMPLES * ARRAYS)
    s = tl.load(sums + sample, mask=sample < samples, other=0.0)
    if FUNCTION == "squares":
        factor = 2 * tl.load(grad_value + sample, mask=sample < samples, other=0.0).to(tl.float64)
    else:
        factor = 2 * tl.load(grad_value).to(tl.float64) * number(table, WEIGHT)
    if FUNCTION == "square":
        factor *= number(columns, SHARE * ARRAYS)
    elif FUNCTION == "largest":
        largest, equal = largest_of(sums, samples, LANES)
        factor = tl.where(is_largest(s, largest), factor / tl.maximum(equal, 1), 0.0)
    elif FUNCTION != "squares":
        root = tl.sqrt(s)
        beyond = root - number(table, CENTER)
        flat = root == 0
        if FUNCTION == "excess":
            flat = flat | (beyond <= 0)
        factor *= number(columns, SHARE * ARRAYS)
        factor = tl.where(flat, 0.0, factor * (beyond / tl.where(flat, 1.0, root)))

    factor = factor.to(ARITHMETIC)
    start = (place % pieces) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, size), TILE):
        offsets = at + tl.arange(0, TILE)
        x = load_tile(row, offsets, size, at, TILE).to(ARITHMETIC)
        store_tile(gradient, offsets, x * factor, size, at, TILE)


# ---- Launchers ----------------------------------------------------------------------------------


def forward(sizes, groups, items, function, center, weight, like):
    """(value, sums) of the contract's groups (first sum, samples) of `sizes` items each, and items
    (address, samples, size, stride, first sum); `like` is a tensor of their dtype and device."""
    total = sum(samples for _, samples in groups)
    with _device.on_device(like):
        sums = like.new_empty(total, dtype=torch.float64)
        shape = (total,) if function == "squares" else ()
        value = like.new_empty(shape, dtype=ARITHMETIC[like.dtype])
        plan = _table(sizes, groups, items, center, weight, like)
        most = max(triton.cdiv(item[2], TILE * plan.run) for item in items)
        _triton.launch(
            forward_kernel,
            (plan.programs,),
            plan.table,
            like.new_empty(plan.programs, dtype=torch.float64),
            sums,
            value,
            len(groups),
            plan.run,
            FUNCTION=function,
            WIDTH=min(16, triton.next_power_of_2(max(1, most))),
            **constants(like, plan),
        )
    return value, sums


def backward(sizes, groups, items, function, center, weight, sums, grad_value, grads):
    """Fills the gradients (None where not wanted), whose samples lie side by side."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return
    with _device.on_device(like):
        plan = _table(sizes, groups, items, center, weight, like, grads)
        _triton.launch(
            backward_kernel,
            (plan.programs,),
            plan.table,
            sums,
            grad_value,
            plan.run,
            FUNCTION=function,
            **constants(like, plan),
        )


def _table(sizes, groups, items, center, weight, like, grads=None):
    """Numbers: center, weight, and what groups without samples add, NaN as in PyTorch. Columns: as
    named at the top."""
    arrays = triton.next_power_of_2(len(items))

    def filled(column):
        return [*column, *[0] * (arrays - len(column))]

    def shares(samples):
        return [1 / n if n else 0.0 for n in samples]

    addresses, samples, lengths, strides, first_sums = (
        list(column) for column in zip(*items, strict=True)
    )
    gradients = [0 if grad is None else grad.data_ptr() for grad in grads or [None] * len(items)]
    rows = samples
    if grads is not None:
        rows = [n if g else 0 for n, g in zip(samples, gradients, strict=True)]
    ends = list(accumulate(sizes))
    group_sums, group_samples = zip(*groups, strict=True)
    columns = [
        *(lengths, strides, first_sums, samples, shares(samples)),
        *([end - size for end, size in zip(ends, sizes, strict=True)], ends),
        *(group_sums, group_samples, shares(group_samples)),
    ]
    return lists(
        [center, weight, 0.0 if all(group_samples) else math.nan],
        filled(lengths),
        [filled(addresses), filled(gradients)],
        [filled(column) for column in columns],
        like.device,
        rows=filled(rows),
        steps=[n * like.element_size() for n in (*strides, *lengths)],
    )
