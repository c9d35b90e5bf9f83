"""Adversarial losses in Triton: a list of discriminators in one launch forward and one backward.
The meaning is csrc/losses/adversarial.h's.

Layout: an array is one side of one term, all real sides first and then all fake ones; in pairs it
is both sides of a term, read together. How arrays become programs, and programs' sums one sum:
ops/_triton_lists.py. Plan of the forward: a program reads its logits once, leaves the sums of φ, of
the logits, of those on their own side of zero and of φ', as far as wanted, and the last program to
arrive makes the loss and the statistics of them. Against the other side's mean a launch before it
leaves the means; both keep what the backward needs. Backward, elementwise: grad_loss is read on the
device and multiplied in before the one rounding. Floor: one read of the logits forward (two against
means), one read and one write backward.
"""

import math

import torch
import triton
import triton.language as tl

from genkern.ops import _device, _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton_lists import (
    added_up,
    array_of,
    arrives_last,
    at_address,
    constants,
    lanes_of,
    leave,
    lists,
    load_tile,
    number,
    store_tile,
)

# Places of the numbers and, behind the firsts, of the columns in the table.
FACTOR = tl.constexpr(2)
ORIENTATION = tl.constexpr(3)
REAL = tl.constexpr(4)
FAKE = tl.constexpr(8)
SHIFT = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
SLOPE = tl.constexpr(3)
FIRSTS = tl.constexpr(12)

# ---- φ ------------------------------------------------------------------------------------------


@triton.jit
def log_of_one_and(e):
    """log(1 + e) for e in [0, 1], precise for small ones: 2·atanh(s) at s = e / (e + 2) <= 1/3."""
    TERMS: tl.constexpr = 16 if e.dtype == tl.float64 else 8
    s = e / (e + 2.0)
    square = s * s
    series = tl.zeros_like(e)
    for n in tl.static_range(TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * n + 1)
    return 2.0 * s * series


@triton.jit
def value_at(z, PHI: tl.constexpr):
    """φ(z)"""
    if PHI == "softplus":
        value = tl.where(z < 0, 0.0, z) + log_of_one_and(tl.exp(tl.where(z < 0, z, -z)))
    elif PHI == "relu":
        value = tl.where(z < 0, 0.0, z)
    elif PHI == "square":
        value = z * z
    else:
        value = z
    return value


@triton.jit
def slope_at(z, PHI: tl.constexpr):
    """φ'(z)"""
    if PHI == "softplus":
        e = tl.exp(tl.where(z < 0, z, -z))
        slope = tl.where(z < 0, e, 1.0) / (1.0 + e)
    elif PHI == "relu":
        slope = tl.where(z <= 0, 0.0, tl.full(z.shape, 1.0, z.dtype))
    elif PHI == "square":
        slope = z + z
    else:
        slope = tl.full(z.shape, 1.0, z.dtype)
    return slope


# ---- Lines --------------------------------------------------------------------------------------


@triton.jit
def shift_of(table, totals, line, array, PAIRING: tl.constexpr, ARRAYS: tl.constexpr):
    """A side's shift, which takes in the mean of the other side where that is subtracted."""
    shift = number(table, line + SHIFT)
    if PAIRING == "average":
        other = (array + ARRAYS // 2) % ARRAYS
        shift -= number(table, line) * tl.load(totals + other)
    return shift


# ---- Forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["terms", "run"])
def forward_kernel(
    table,  # int64: see `_table`
    partials,  # [sums, programs] doubles, written and read by this launch alone
    totals,  # [2, ARRAYS] doubles where means are subtracted: means of the arrays, sums of their φ'
    loss,  # one number of ARITHMETIC
    statistics,  # [4, terms] of ARITHMETIC, or anything where not wanted
    terms,
    run,
    PASS: tl.constexpr,  # "means", the launch before, or "values"
    PHI: tl.constexpr,
    PAIRING: tl.constexpr,
    OF_LOGITS: tl.constexpr,  # whether sums of the logits themselves are wanted
    OF_SIGNS: tl.constexpr,  # whether statistics are wanted
    ELEMENT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    PAIRED: tl.constexpr = PAIRING == "paired"
    VALUES: tl.constexpr = PASS == "values"
    program = tl.program_id(0).to(tl.int64)
    firsts = table + FIRSTS
    array = array_of(firsts, program, ARRAYS)
    columns = firsts + ARRAYS + 1 + array
    line = REAL if PAIRED else tl.where(array < ARRAYS // 2, REAL, FAKE)
    numbers = at_address(columns, ELEMENT, ALIGNMENT)
    others = at_address(columns + ARRAYS, ELEMENT, ALIGNMENT)
    count = tl.load(columns + 4 * ARRAYS)
    toward = number(table, ORIENTATION)
    toward = (toward if PAIRED else tl.where(array < ARRAYS // 2, toward, -toward)).to(ARITHMETIC)
    sign = number(table, line).to(ARITHMETIC)
    shift = number(table, line + SHIFT)
    if VALUES:
        shift = shift_of(table, totals, line, array, PAIRING, ARRAYS)
    shift = shift.to(ARITHMETIC)
    other_sign = number(table, FAKE).to(ARITHMETIC)

    value = tl.zeros([TILE], ARITHMETIC)
    slope = tl.zeros([TILE], ARITHMETIC)
    logits = tl.zeros([TILE], ARITHMETIC)
    right = tl.zeros([TILE], ARITHMETIC)
    other_logits = tl.zeros([TILE], ARITHMETIC)
    other_right = tl.zeros([TILE], ARITHMETIC)
    start = (program - tl.load(firsts + array)) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, count), TILE):
        offsets = at + tl.arange(0, TILE)
        live = offsets < count
        x = load_tile(numbers, offsets, count, at, TILE).to(ARITHMETIC)
        z = x * sign + shift
        if PAIRED:
            other = load_tile(others, offsets, count, at, TILE).to(ARITHMETIC)
            z += other * other_sign
        if VALUES:
            value += tl.where(live, value_at(z, PHI), 0.0)
            if PAIRING == "average":
                slope += tl.where(live, slope_at(z, PHI), 0.0)
        if OF_LOGITS:  # zero beyond the end
            logits += x
            if PAIRED:
                other_logits += other
        if OF_SIGNS:
            right += tl.where(x * toward > 0, 1.0, 0.0)
            if PAIRED:
                other_right += tl.where(other * toward < 0, 1.0, 0.0)

    if VALUES:
        leave(partials, 0, value)
    if OF_LOGITS:
        leave(partials, 1, logits)
    if OF_SIGNS:
        leave(partials, 2, right)
    if VALUES and PAIRING == "average":
        leave(partials, 3, slope)
    if PAIRED and OF_LOGITS:
        leave(partials, 3, other_logits)
    if PAIRED and OF_SIGNS:
        leave(partials, 4, other_right)

    if VALUES:
        if arrives_last(table):
            finish(
                table,
                partials,
                totals,
                loss,
                statistics,
                terms,
                PAIRING,
                OF_LOGITS,
                OF_SIGNS,
                ARITHMETIC,
                ARRAYS,
            )
    else:
        if arrives_last(table + 1):
            arrays = tl.arange(0, ARRAYS)
            means = added_up(partials, 1, firsts, ARRAYS)
            tl.store(totals + arrays, means * number(firsts, ARRAYS + 1 + 5 * ARRAYS + arrays))


@triton.jit
def finish(
    table,
    partials,
    totals,
    loss,
    statistics,
    terms,
    PAIRING: tl.constexpr,
    OF_LOGITS: tl.constexpr,
    OF_SIGNS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ARRAYS: tl.constexpr,
):
    """All programs' sums become the loss, the statistics and what the backward wants to know."""
    PAIRED: tl.constexpr = PAIRING == "paired"
    AVERAGE: tl.constexpr = PAIRING == "average"
    REALS: tl.constexpr = ARRAYS if PAIRED else ARRAYS // 2
    firsts = table + FIRSTS
    arrays = tl.arange(0, ARRAYS)
    first = tl.load(firsts + arrays)
    programs = tl.load(firsts + arrays + 1) - first
    lanes = lanes_of(ARRAYS)
    row = tl.num_programs(0)
    value = tl.zeros([ARRAYS, lanes.shape[1]], tl.float64)
    logits = tl.zeros_like(value)
    right = tl.zeros_like(value)
    third = tl.zeros_like(value)
    fourth = tl.zeros_like(value)
    for at in range(0, tl.max(programs, 0), lanes.shape[1]):
        live = at + lanes < programs[:, None]
        entry = partials + first[:, None] + at + lanes
        value += tl.load(entry, mask=live, other=0.0)
        if OF_LOGITS:
            logits += tl.load(entry + row, mask=live, other=0.0)
        if OF_SIGNS:
            right += tl.load(entry + 2 * row, mask=live, other=0.0)
        if AVERAGE or (PAIRED and OF_LOGITS):
            third += tl.load(entry + 3 * row, mask=live, other=0.0)
        if PAIRED and OF_SIGNS:
            fourth += tl.load(entry + 4 * row, mask=live, other=0.0)

    inverse = number(firsts, ARRAYS + 1 + 5 * ARRAYS + arrays)
    line = tl.where(arrays < REALS, REAL, FAKE)
    values = tl.sum(value, 1)
    means = tl.sum(logits, 1) * inverse
    losses = number(table, line + WEIGHT) * values * inverse
    if OF_LOGITS:
        # Without a slope infinite logits have no part in the loss.
        slope = number(table, line + SLOPE)
        with_slope = losses + number(table, line + WEIGHT) * slope * means
        losses = tl.where(slope == 0, losses, with_slope)
    tl.store(loss, (number(table, FACTOR) * tl.sum(losses, 0)).to(ARITHMETIC))
    if AVERAGE:
        tl.store(totals + ARRAYS + arrays, tl.sum(third, 1))
    if OF_SIGNS:
        term = arrays % REALS
        entries = statistics + tl.where(arrays < REALS, 0, terms) + term
        tl.store(entries, means.to(ARITHMETIC), term < terms)
        shares = tl.sum(right, 1) * inverse
        tl.store(entries + 2 * terms, shares.to(ARITHMETIC), term < terms)
        if PAIRED:
            means = tl.sum(third, 1) * inverse
            shares = tl.sum(fourth, 1) * inverse
            tl.store(entries + terms, means.to(ARITHMETIC), term < terms)
            tl.store(entries + 3 * terms, shares.to(ARITHMETIC), term < terms)


# ---- Backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["run"])
def backward_kernel(
    table,
    totals,  # as the forward has left them
    grad_loss,  # one number of ARITHMETIC
    run,
    PHI: tl.constexpr,
    PAIRING: tl.constexpr,
    ELEMENT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ARRAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    PAIRED: tl.constexpr = PAIRING == "paired"
    program = tl.program_id(0).to(tl.int64)
    firsts = table + FIRSTS
    array = array_of(firsts, program, ARRAYS)
    columns = firsts + ARRAYS + 1 + array
    line = REAL if PAIRED else tl.where(array < ARRAYS // 2, REAL, FAKE)
    numbers = at_address(columns, ELEMENT, ALIGNMENT)
    others = at_address(columns + ARRAYS, ELEMENT, ALIGNMENT)
    gradient = at_address(columns + 2 * ARRAYS, ELEMENT, ALIGNMENT)
    other_gradient = at_address(columns + 3 * ARRAYS, ELEMENT, ALIGNMENT)
    count = tl.load(columns + 4 * ARRAYS)

    upstream = tl.load(grad_loss).to(tl.float64) * number(table, FACTOR)
    share = number(columns, 5 * ARRAYS)
    scale = upstream * number(table, line + WEIGHT) * share
    factor = (scale * number(table, line)).to(ARITHMETIC)
    other_factor = (scale * number(table, FAKE)).to(ARITHMETIC)
    offset = scale * number(table, line + SLOPE)
    if PAIRING == "average":  # what flows through the mean
        other = (array + ARRAYS // 2) % ARRAYS
        other_line = tl.where(array < ARRAYS // 2, FAKE, REAL)
        through = upstream * number(table, other_line) * number(table, other_line + WEIGHT)
        through *= number(firsts, ARRAYS + 1 + 5 * ARRAYS + other)
        offset = -through * tl.load(totals + ARRAYS + other) * share
    offset = offset.to(ARITHMETIC)
    sign = number(table, line).to(ARITHMETIC)
    shift = shift_of(table, totals, line, array, PAIRING, ARRAYS).to(ARITHMETIC)
    other_sign = number(table, FAKE).to(ARITHMETIC)

    start = (program - tl.load(firsts + array)) * run * TILE
    for at in range(start, tl.minimum(start + run * TILE, count), TILE):
        offsets = at + tl.arange(0, TILE)
        z = load_tile(numbers, offsets, count, at, TILE).to(ARITHMETIC) * sign + shift
        if PAIRED:
            z += load_tile(others, offsets, count, at, TILE).to(ARITHMETIC) * other_sign
        slope = slope_at(z, PHI)
        if PAIRED:
            if gradient.to(tl.int64) != 0:
                store_tile(gradient, offsets, slope * factor, count, at, TILE)
            if other_gradient.to(tl.int64) != 0:
                store_tile(other_gradient, offsets, slope * other_factor, count, at, TILE)
        else:
            store_tile(gradient, offsets, slope * factor + offset, count, at, TILE)


# ---- Launchers ----------------------------------------------------------------------------------


def forward(form, factor, stats, count, logits):
    """(loss, statistics [4 · count] or None, totals that the backward wants or None) of dense
    logits: real ones, where that side has a part, then as many fake ones, `count`."""
    fake = logits[-1]
    with _device.on_device(fake):
        loss = fake.new_empty((), dtype=ARITHMETIC[fake.dtype])
        statistics = loss.new_empty(4 * count) if stats else None
        plan = _table(form, factor, count, logits)
        partials = loss.new_empty((5, plan.programs), dtype=torch.float64)
        averaged = form.pairing == "average"
        totals = loss.new_empty((2, plan.arrays), dtype=torch.float64) if averaged else None
        passes = [("values", stats or form.real.slope != 0 or form.fake.slope != 0, stats)]
        if averaged:
            passes.insert(0, ("means", True, False))
        for name, of_logits, of_signs in passes:
            _triton.launch(
                forward_kernel,
                (plan.programs,),
                plan.table,
                partials,
                partials if totals is None else totals,
                loss,
                loss if statistics is None else statistics,
                count,
                plan.run,
                PASS=name,
                PHI=form.phi,
                PAIRING=form.pairing,
                OF_LOGITS=of_logits,
                OF_SIGNS=of_signs,
                **constants(fake, plan, many_sums=form.pairing == "paired"),
            )
    return loss, statistics, totals


def backward(form, factor, count, logits, totals, grad_loss, gradients):
    """Fills the gradients (None where not wanted)."""
    fake = logits[-1]
    with _device.on_device(fake):
        if form.pairing == "average" and totals is None:
            totals = forward(form, factor, False, count, logits)[2]
        plan = _table(form, factor, count, logits, gradients)
        _triton.launch(
            backward_kernel,
            (plan.programs,),
            plan.table,
            plan.table if totals is None else totals,
            grad_loss,
            plan.run,
            PHI=form.phi,
            PAIRING=form.pairing,
            **constants(fake, plan),
        )


def _table(form, factor, count, logits, gradients=None):
    """Numbers: factor, orientation, the real line, the fake line. Columns: addresses of the logits
    and of the other side's in pairs, of the gradients of both, counts, -1 where a side has no
    part, and their inverses: what makes a sum a mean, NaN of no logits, as in PyTorch. (A division
    of doubles on the device would be a call that costs registers.) With gradients, programs are for
    those that want one."""
    terms = triton.next_power_of_2(count)

    def filled(side, filler=0):
        return [*side, *[filler] * (terms - len(side))]

    def by_array(column, filler=0):
        return [*filled(column[:-count], filler), *filled(column[-count:], filler)]

    addresses = [x.data_ptr() for x in logits]
    grads = [0 if g is None else g.data_ptr() for g in gradients or [None] * len(logits)]
    counts = [x.numel() for x in logits]
    if form.pairing == "paired":
        sides = [filled(x) for both in (addresses, grads) for x in (both[:count], both[count:])]
        counts = filled(counts[:count], -1)
    else:
        nothing = [0] * 2 * terms
        sides = [by_array(addresses), nothing, by_array(grads), nothing]
        counts = by_array(counts, -1)
    work = counts
    if gradients is not None:
        work = [n if a or b else 0 for n, a, b in zip(counts, *sides[2:], strict=True)]
    shares = [1 / n if n > 0 else 0.0 if n < 0 else math.nan for n in counts]
    numbers = [factor, form.orientation, *form.real, *form.fake]
    return lists(numbers, work, sides, [counts, shares], logits[-1].device)
