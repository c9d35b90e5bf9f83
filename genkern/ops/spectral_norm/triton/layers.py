"""What the forward and the backward kernels share: how a launch covers all layers of a list.

A call has one table of int64 numbers, a row of fields for each layer (addresses, sizes). A launch
has, for each layer, as many programs as the layer is worth; a field of the table tells the first of
them, so that a program finds its layer, and its number there, by its own number.

A weight [outer, rows, inner] (csrc/spectral_norm/spectral_norm.h) is seen as a matrix [far, near],
whose element (f, n) lies at

    f·far_stride + (n // near_inner)·near_jump + n % near_inner

so that neighbours along `near` are neighbours in memory. Rows are far and columns near, except
where the rows are innermost (a weight normalised along its last dimension): there columns are far.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton import element_type
from genkern.ops.spectral_norm.arguments import OP

FLAT = tl.constexpr(4096)  # elements that a flat loop takes at once
TILE = tl.constexpr(64)  # rows and columns of a square tile


class Matrix(NamedTuple):
    """A weight's view as [far, near]; the fields of a table's row, in this order. int32, but for
    far_stride and near_jump: positions along a vector are divided by."""

    far: tl.tensor
    near: tl.tensor
    far_stride: tl.tensor
    near_inner: tl.tensor
    near_jump: tl.tensor


@triton.jit
def find_layer(table, layers, first, FIELDS: tl.constexpr, LAYERS: tl.constexpr):
    """(the row of this program's layer, this program's number there). first: the field that holds
    each layer's first program, ascending; LAYERS: a power of 2, at least `layers`."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, LAYERS)
    is_layer = index < layers
    firsts = tl.load(table + index * FIELDS + first, mask=is_layer, other=0)
    begun = is_layer & (firsts <= program)
    row = table + (tl.sum(begun.to(tl.int32), 0) - 1) * FIELDS
    return row, (program - tl.load(row + first)).to(tl.int32)


@triton.jit
def load_matrix(fields):
    return Matrix(
        tl.load(fields).to(tl.int32),
        tl.load(fields + 1).to(tl.int32),
        tl.load(fields + 2),
        tl.load(fields + 3).to(tl.int32),
        tl.load(fields + 4),
    )


@triton.jit
def near_offsets(matrix, near):
    offsets = near.to(tl.int64)
    if matrix.near_inner < matrix.near:
        offsets = (near // matrix.near_inner) * matrix.near_jump + near % matrix.near_inner
    return offsets


@triton.jit
def own_index(at, leading, length):
    """Where a vector in its own order has the elements `at` of memory's order: [leading, …] in the
    one, transposed in the other."""
    index = at
    if leading > 1:
        index = (at % leading) * (length // leading) + at // leading
    return index


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED: the address is a multiple of 16, which lets a thread load 16 bytes at once."""
    typed = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(typed, 16) if ALIGNED else typed


@triton.jit
def load_flat(first, start, end):
    """FLAT elements from `start` on; 0 from `end` on. A mask would forbid wide loads."""
    at = start + tl.arange(0, FLAT)
    if start + FLAT <= end:
        x = tl.load(first + at)
    else:
        x = tl.load(first + at, mask=at < end, other=0.0)
    return x


@triton.jit
def store_flat(first, start, end, x):
    at = start + tl.arange(0, FLAT)
    if start + FLAT <= end:
        tl.store(first + at, x)
    else:
        tl.store(first + at, x, mask=at < end)


# ---- Rows of the table --------------------------------------------------------------------------

LONGEST = 2**30  # rows or columns, so that positions beyond the end are int32, too
PROGRAMS = 256  # that one layer's launch is split into, if its size allows it
LEAST_STEPS, MOST_SPLITS = 4, 32
FLAT_PROGRAMS = 512  # the same for a pass over memory


def matrix_of(outer, rows, inner):
    """((far, near, far_stride, near_inner, near_jump), whether far are the rows)"""
    if max(rows, outer * inner) >= LONGEST:
        raise ValueError(
            f"{OP}: the Triton kernels take weights of less than {LONGEST} rows and columns, and "
            f"this one has {rows} rows and {outer * inner} columns"
        )
    if inner == 1 and outer > 1:
        return (outer, rows, rows, max(rows, 1), 0), False
    return (rows, outer * inner, inner, max(inner, 1), rows * inner), True


def split_sum(panels, steps):
    """(splits, steps of each) for panels that each are sums over so many steps: enough splits for
    the GPU to be busy, few enough that adding them up is cheap."""
    splits = max(1, min(PROGRAMS // panels, steps // LEAST_STEPS, MOST_SPLITS))
    per_split = ceil_div(max(steps, 1), splits)
    return ceil_div(max(steps, 1), per_split), per_split


def split_flat(elements):
    """(programs, loops of each) for a pass over so many elements, FLAT a loop."""
    loops = max(1, ceil_div(elements, FLAT.value))
    per_program = ceil_div(loops, FLAT_PROGRAMS)
    return ceil_div(loops, per_program), per_program


def ceil_div(a, b):
    return -(-a // b)


def are_aligned(addresses):
    return not any(address % 16 for address in addresses)


def launch_options(dtype, layers):
    """What all kernels are given by keyword. LAYERS takes few different values, since each is a
    compilation."""
    return {
        "T": element_type(dtype),
        "ACC": element_type(ARITHMETIC[dtype]),
        "LAYERS": max(32, triton.next_power_of_2(layers)),
        "num_warps": 8,
        "num_stages": 1,
    }
