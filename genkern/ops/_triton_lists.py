"""What the Triton kernels share that read lists of flat arrays in one launch and add them up.

Layout: every array is cut into tiles of TILE elements, and a program takes `run` tiles, one after
another, of one array. A table of int64 numbers on the device says which: it opens with counters at
zero and the loss's own numbers (doubles, by their bits); then come columns of one entry an array,
the first program of each before all. Plan of a sum: every program leaves its sums in a row of
doubles and counts itself; the last to arrive adds the rows up in their order, so the same bits come
on every run, whatever the number of programs that a GPU runs at once. A table is uploaded anew for
every launch, so the counter is at zero then: on any stream, and at each replay of a CUDA graph.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from genkern.ops import _device, _triton

TILE = 1024
PROGRAMS_AIM = 2048  # with fewer a big GPU is not full; with many more the last one adds long
LONGEST_RUN = 32  # tiles that one fp32 lane adds up before its sum becomes a double
LANES = tl.constexpr(256)  # partial sums that the last program reads at a time
REGISTERS = 168  # of a thread, at most
COUNTERS = 2  # of a table, for as many launches that share it


# ---- Kernels' parts -----------------------------------------------------------------------------


@triton.jit
def number(table, place):
    """A double that the table holds by its bits."""
    return tl.load(table + place).to(tl.float64, bitcast=True)


@triton.jit
def array_of(firsts, program, ARRAYS: tl.constexpr):
    """The array that a program works on: the last whose first program is not after it."""
    starts = tl.load(firsts + tl.arange(0, ARRAYS))
    return tl.sum((starts <= program).to(tl.int32), 0) - 1


@triton.jit
def at_address(place, ELEMENT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The pointer that the table holds at this place."""
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(ELEMENT)), ALIGNMENT)


@triton.jit
def load_tile(pointer, offsets, count, at, TILE: tl.constexpr):
    """Elements at, at + 1, …; zero beyond the array's end. Whole tiles need no mask: only then can
    a thread load 16 bytes at a time."""
    if at + TILE <= count:
        tile = tl.load(pointer + offsets)
    else:
        tile = tl.load(pointer + offsets, mask=offsets < count, other=0.0)
    return tile


@triton.jit
def store_tile(pointer, offsets, values, count, at, TILE: tl.constexpr):
    if at + TILE <= count:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=offsets < count)


@triton.jit
def leave(partials, which, values):
    """Stores the sum of a program's lanes as its entry of one row of the partial sums."""
    total = tl.sum(values.to(tl.float64), 0)
    tl.store(partials + which * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def arrives_last(counter):
    """Whether all other programs have been here: then all that they stored before can be seen."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def lanes_of(ARRAYS: tl.constexpr):
    """[1, WIDTH] numbers from 0: the programs of every array whose sums are read at a time."""
    return tl.arange(0, LANES // ARRAYS if LANES > ARRAYS else 1)[None, :]


@triton.jit
def added_up(partials, which, firsts, ARRAYS: tl.constexpr):
    """One row of the partial sums, added up array by array: [ARRAYS]."""
    arrays, lanes = tl.arange(0, ARRAYS)[:, None], lanes_of(ARRAYS)
    first = tl.load(firsts + arrays)
    programs = tl.load(firsts + arrays + 1) - first
    row = partials + which * tl.num_programs(0) + first
    total = tl.zeros([ARRAYS, lanes.shape[1]], tl.float64)
    for at in range(0, tl.max(tl.max(programs, 1), 0), lanes.shape[1]):
        total += tl.load(row + at + lanes, mask=at + lanes < programs, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def all_added_up(partials, which):
    """One row of the partial sums, added up over all programs."""
    lanes = tl.arange(0, LANES)
    programs = tl.num_programs(0)
    total = tl.zeros([LANES], tl.float64)
    for at in range(0, programs, LANES):
        entry = partials + which * programs + at + lanes
        total += tl.load(entry, mask=at + lanes < programs, other=0.0)
    return tl.sum(total, 0)


# ---- Tables -------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """A table and what its kernels are launched with."""

    table: torch.Tensor
    programs: int
    run: int  # tiles a program
    arrays: int  # entries of a column, a power of two
    alignment: int  # bytes that all addresses are a multiple of


def lists(numbers, counts, addresses, columns, device, rows=None, steps=()):
    """The table of some arrays: COUNTERS zeros, `numbers` (doubles), the first program of each
    array and the number of all, and the columns: `addresses`, then the others. A column has an
    entry, an integer or a double, an array; their number is a power of two. `counts` says how many
    elements of each array programs are wanted for; with `rows`, of each of so many rows of it, no
    two of which share a program. `steps`: by how many bytes addresses are moved."""
    run, firsts = cut(counts, rows or [1] * len(counts))
    entries = [*[0] * COUNTERS, *(_bits(float(x)) for x in numbers), *firsts]
    for column in (*addresses, *columns):
        entries += map(_bits, column)
    moves = (*steps, *(address for column in addresses for address in column))
    alignment = 1 if any(move % 16 for move in moves) else 16
    table = _device.device_table(entries, device)
    return Lists(table, max(1, firsts[-1]), run, len(counts), alignment)


def cut(counts, rows):
    """(tiles that a program takes, the first program of each array and last the number of all)"""
    tiles = [triton.cdiv(max(0, count), TILE) for count in counts]
    total = sum(n * times for n, times in zip(tiles, rows, strict=True))
    run = min(LONGEST_RUN, triton.next_power_of_2(max(1, triton.cdiv(total, PROGRAMS_AIM))))
    programs = (triton.cdiv(n, run) * times for n, times in zip(tiles, rows, strict=True))
    return run, [0, *accumulate(programs)]


def _bits(x):
    return _triton.double_bits(x) if isinstance(x, float) else x


def constants(tensor, plan, many_sums=False):
    """What every kernel over lists of such tensors is compiled for. `many_sums`: whether so many
    are kept in registers at once that a thread should have fewer lanes, as with many arrays."""
    wide = tensor.dtype is torch.float64
    options = {
        "ELEMENT": _triton.element_type(tensor.dtype),
        "ARITHMETIC": tl.float64 if wide else tl.float32,
        "ALIGNMENT": plan.alignment,
        "ARRAYS": plan.arrays,
        "TILE": TILE,
        "num_warps": 8 if wide or many_sums or plan.arrays > 64 else 4,
    }
    if _triton.target(tensor).startswith("sm_"):
        # ptxas would rather spill, for the sake of more blocks at once.
        options["maxnreg"] = REGISTERS
    return options
