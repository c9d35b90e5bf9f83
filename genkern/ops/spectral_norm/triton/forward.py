"""Spectral normalization, forward: power iterations, σ and Ŵ = W/σ of all layers together.

Each iteration makes two vectors, b from a and then a from b (u first: a = v, b = u; v first: the
other way round), every one the norm(…) of a product of W or Wᵀ.

    launch 2i        b̃ = product with a        launch 2i + 1        a ← ã = product with b
    last launch      a, σ, Ŵ = W/σ

A launch cannot divide by the norm of what it is still summing: it writes sums, x̃ [splits, length],
and every program of the next launch adds them up, in order, and divides by max(‖x̃‖, eps). The last
launch that reads a vector so also writes it to the state and to the user's buffers.
After an update σ = b·W a (or its transpose) is ã·a = ‖ã‖²/max(‖ã‖, eps), whether eps clamps or not;
without one (no iterations) it is b·b̃. W is read once a launch.

Products (layers.py: the matrix [far, near]): far vectors are sums over `near` in wide tiles, near
vectors sums over `far` in square ones; a long sum is split among programs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from genkern.ops._device import device_table, on_device
from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton import double_bits, launch
from genkern.ops.spectral_norm.triton.layers import (
    FLAT,
    TILE,
    are_aligned,
    ceil_div,
    find_layer,
    launch_options,
    load_flat,
    load_matrix,
    matrix_of,
    near_offsets,
    own_index,
    pointer,
    split_flat,
    split_sum,
    store_flat,
)

# The fields of a layer's row; Matrix and the two Vectors have several.
FIRST_EVEN, FIRST_ODD, FIRST_WRITE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WRITE_LOOPS, ELEMENTS = tl.constexpr(3), tl.constexpr(4)
STEPS, ITERATIONS = tl.constexpr(5), tl.constexpr(6)
EVEN_MAKES_FAR, WIDE, EPS = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
WEIGHT, NORMALIZED, SIGMA = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
MATRIX, A, B = tl.constexpr(13), tl.constexpr(18), tl.constexpr(26)
FIELDS = tl.constexpr(34)

WIDE_ROWS, WIDE_COLUMNS = tl.constexpr(32), tl.constexpr(128)
VECTOR = tl.constexpr(1024)  # elements of a vector that are taken at once
HUGE, TINY = tl.constexpr(2.0**100), tl.constexpr(2.0**-80)


class Vector(NamedTuple):
    """u or v: 8 fields of a row. `buffer` holds it before, `store` (or 0) and `state` after, all in
    the vector's own order; `sums` [splits, length], in memory's order, each over `loops` tiles."""

    buffer: tl.tensor
    store: tl.tensor
    state: tl.tensor
    leading: tl.tensor
    length: tl.tensor
    sums: tl.tensor
    splits: tl.tensor
    loops: tl.tensor


@triton.jit
def load_vector(fields):
    return Vector(
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3).to(tl.int32),
        tl.load(fields + 4).to(tl.int32),
        tl.load(fields + 5),
        tl.load(fields + 6).to(tl.int32),
        tl.load(fields + 7).to(tl.int32),
    )


# ---- Vectors ------------------------------------------------------------------------------------


@triton.jit
def buffered(vector, wide, at, T: tl.constexpr, ACC: tl.constexpr):
    """The elements `at` (of memory's order) as they were before the call; 0 beyond the end."""
    inside = at < vector.length
    index = own_index(at, vector.leading, vector.length)
    if wide != 0:
        x = tl.load(pointer(vector.buffer, ACC, False) + index, mask=inside, other=0.0)
    else:
        x = tl.load(pointer(vector.buffer, T, False) + index, mask=inside, other=0.0).to(ACC)
    return x


@triton.jit
def added_up(vector, at, AT_ONCE: tl.constexpr, ACC: tl.constexpr):
    """The elements `at` of what the launch before summed, not yet normalised; 0 beyond the end."""
    sums = pointer(vector.sums, ACC, False)
    total = tl.zeros(at.shape, ACC)
    for first in range(0, vector.splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = first + i
            end = tl.where(split < vector.splits, vector.length, 0)
            row = sums + split.to(tl.int64) * vector.length
            total += tl.load(row + at, mask=at < end, other=0.0)
    return total


@triton.jit
def norm(vector, ACC: tl.constexpr):
    """‖x̃‖. Squared as they are, scaled down and scaled up: fp32 holds one of the three."""
    plain = tl.zeros((VECTOR,), ACC)
    down = tl.zeros((VECTOR,), ACC)
    up = tl.zeros((VECTOR,), ACC)
    for start in range(0, vector.length, VECTOR):
        x = added_up(vector, start + tl.arange(0, VECTOR), 4, ACC)
        plain += x * x
        down += (x * TINY) * (x * TINY)
        up += (x * HUGE) * (x * HUGE)
    squared = tl.sum(plain, 0)
    of_small = tl.sqrt(tl.sum(up, 0)) / HUGE
    of_large = tl.sqrt(tl.sum(down, 0)) / TINY
    moderate_or_small = tl.where(squared < TINY, of_small, tl.sqrt(squared))
    return tl.where(squared > HUGE, of_large, moderate_or_small)  # a NaN stays


@triton.jit
def keep(vector, wide, x, at, stored: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    """Writes elements of the new vector: to the state and, `stored`, where the user has it."""
    inside = at < vector.length
    index = own_index(at, vector.leading, vector.length)
    tl.store(pointer(vector.state, ACC, False) + index, x, mask=inside)
    if stored:
        to_store = at < tl.where(vector.store != 0, vector.length, 0)
        if wide != 0:
            tl.store(pointer(vector.store, ACC, False) + index, x, mask=to_store)
        else:
            tl.store(pointer(vector.store, T, False) + index, x.to(T), mask=to_store)


@triton.jit
def keep_normalized(vector, wide, size, program, programs, T: tl.constexpr, ACC: tl.constexpr):
    """This program's share of a vector that the launch before summed."""
    for start in range(program.to(tl.int64) * VECTOR, vector.length, programs * VECTOR):
        at = (start + tl.arange(0, VECTOR)).to(tl.int32)
        keep(vector, wide, added_up(vector, at, 1, ACC) / size, at, True, T, ACC)


# ---- Products -----------------------------------------------------------------------------------


@triton.jit
def factors(given, wide, size, at, FROM_BUFFER: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    """Elements of the vector that the matrix is multiplied by."""
    return buffered(given, wide, at, T, ACC) if FROM_BUFFER else added_up(given, at, 1, ACC) / size


@triton.jit
def make_far(
    weight, matrix, given, made, wide, size, tile,
    FROM_BUFFER: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ_n W(f, n) x(n) of one panel of f, over this program's n."""
    panels = (matrix.far + WIDE_ROWS - 1) // WIDE_ROWS
    panels = tl.maximum(panels, 1)
    split = tile // panels
    far = (tile % panels) * WIDE_ROWS + tl.arange(0, WIDE_ROWS)
    rows = weight + (far * matrix.far_stride)[:, None]
    first = split * made.loops * WIDE_COLUMNS
    end = tl.minimum(first + made.loops * WIDE_COLUMNS, matrix.near)
    total = tl.zeros((WIDE_ROWS, WIDE_COLUMNS), ACC)
    for start in range(first, end, WIDE_COLUMNS):
        near = start + tl.arange(0, WIDE_COLUMNS)
        x = factors(given, wide, size, near, FROM_BUFFER, T, ACC)
        inside = (far < matrix.far)[:, None] & (near < matrix.near)[None, :]
        w = tl.load(rows + near_offsets(matrix, near)[None, :], mask=inside, other=0.0)
        total += w.to(ACC) * x[None, :]
    sums = pointer(made.sums, ACC, False) + split.to(tl.int64) * made.length
    tl.store(sums + far, tl.sum(total, 1), mask=far < matrix.far)


@triton.jit
def make_near(
    weight, matrix, given, made, wide, size, tile,
    FROM_BUFFER: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ_f W(f, n) x(f) of one panel of n, over this program's f."""
    panels = (matrix.near + TILE - 1) // TILE
    panels = tl.maximum(panels, 1)
    split = tile // panels
    near = (tile % panels) * TILE + tl.arange(0, TILE)
    columns = weight + near_offsets(matrix, near)[None, :]
    first = split * made.loops * TILE
    end = tl.minimum(first + made.loops * TILE, matrix.far)
    total = tl.zeros((TILE, TILE), ACC)
    for start in range(first, end, TILE):
        far = start + tl.arange(0, TILE)
        x = factors(given, wide, size, far, FROM_BUFFER, T, ACC)
        inside = (far < matrix.far)[:, None] & (near < matrix.near)[None, :]
        w = tl.load(columns + (far * matrix.far_stride)[:, None], mask=inside, other=0.0)
        total += w.to(ACC) * x[:, None]
    sums = pointer(made.sums, ACC, False) + split.to(tl.int64) * made.length
    tl.store(sums + near, tl.sum(total, 0), mask=near < matrix.near)


@triton.jit(do_not_specialize=["layers", "step"])
def spectral_norm_product(
    table, layers, step,
    ODD: tl.constexpr, FIRST: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """Launch number `step`: ODD makes a from b, the others b from a, the FIRST from the buffers."""
    row, tile = find_layer(table, layers, FIRST_ODD if ODD else FIRST_EVEN, FIELDS, LAYERS)
    steps = tl.load(row + STEPS)
    if step < steps:  # a layer of fewer iterations sits out
        weight = pointer(tl.load(row + WEIGHT), T, False)
        wide = tl.load(row + WIDE)
        matrix = load_matrix(row + MATRIX)
        given = load_vector(row + (B if ODD else A))
        made = load_vector(row + (A if ODD else B))
        makes_far = tl.load(row + EVEN_MAKES_FAR) != ODD
        size = tl.full((), 1.0, ACC)
        if not FIRST:
            eps = tl.load(row + EPS).to(tl.float64, bitcast=True).to(ACC)
            size = norm(given, ACC)
            size = tl.where(size < eps, eps, size)
            if step + 1 == steps:
                width = tl.where(makes_far, WIDE_ROWS, TILE)
                programs = tl.maximum((made.length + width - 1) // width, 1) * made.splits
                keep_normalized(given, wide, size, tile, programs.to(tl.int64), T, ACC)
        if makes_far:
            make_far(weight, matrix, given, made, wide, size, tile, FIRST, T, ACC)
        else:
            make_near(weight, matrix, given, made, wide, size, tile, FIRST, T, ACC)


# ---- σ and Ŵ ------------------------------------------------------------------------------------


@triton.jit
def copy_to_state(vector, wide, program, programs, T: tl.constexpr, ACC: tl.constexpr):
    for start in range(program.to(tl.int64) * VECTOR, vector.length, programs * VECTOR):
        at = (start + tl.arange(0, VECTOR)).to(tl.int32)
        keep(vector, wide, buffered(vector, wide, at, T, ACC), at, False, T, ACC)


@triton.jit
def overlap(vector, wide, T: tl.constexpr, ACC: tl.constexpr):
    """x·x̃ of the stored vector and the product that the launch before summed."""
    total = tl.zeros((VECTOR,), ACC)
    for start in range(0, vector.length, VECTOR):
        at = start + tl.arange(0, VECTOR)
        total += buffered(vector, wide, at, T, ACC) * added_up(vector, at, 4, ACC)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["layers"])
def spectral_norm_write(
    table, layers,
    T: tl.constexpr, ACC: tl.constexpr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, tile = find_layer(table, layers, FIRST_WRITE, FIELDS, LAYERS)
    wide = tl.load(row + WIDE)
    loops, elements = tl.load(row + WRITE_LOOPS), tl.load(row + ELEMENTS)
    span = loops * FLAT
    programs = tl.maximum((elements + span - 1) // span, 1)
    a = load_vector(row + A)
    sigma = tl.full((), 0.0, ACC)
    if tl.load(row + ITERATIONS) > 0:
        eps = tl.load(row + EPS).to(tl.float64, bitcast=True).to(ACC)
        computed = norm(a, ACC)
        size = tl.where(computed < eps, eps, computed)
        sigma = computed * (computed / size)
        keep_normalized(a, wide, size, tile, programs, T, ACC)
    else:
        b = load_vector(row + B)
        sigma = overlap(b, wide, T, ACC)
        copy_to_state(a, wide, tile, programs, T, ACC)
        copy_to_state(b, wide, tile, programs, T, ACC)
    if tile == 0:
        tl.store(pointer(tl.load(row + SIGMA), ACC, False), sigma)
    weight = pointer(tl.load(row + WEIGHT), T, ALIGNED)
    normalized = pointer(tl.load(row + NORMALIZED), T, ALIGNED)
    for loop in range(0, loops):
        start = (tile * loops + loop) * FLAT
        w = load_flat(weight, start, elements).to(ACC)
        store_flat(normalized, start, elements, (w / sigma).to(T))


# ---- Launches -----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How a layer is cut: everything in its row of the table that its layout alone decides."""

    matrix: tuple
    far_is_u: bool
    elements: int
    far_programs: int
    far_splits: int
    far_loops: int
    near_programs: int
    near_splits: int
    near_loops: int
    write_programs: int
    write_loops: int


@lru_cache(maxsize=4096)
def _plan(outer, rows, inner):
    matrix, far_is_u = matrix_of(outer, rows, inner)
    far, near = matrix[:2]
    far_panels = max(1, ceil_div(far, WIDE_ROWS.value))
    near_panels = max(1, ceil_div(near, TILE.value))
    far_splits, far_loops = split_sum(far_panels, ceil_div(near, WIDE_COLUMNS.value))
    near_splits, near_loops = split_sum(near_panels, ceil_div(far, TILE.value))
    return _Plan(
        matrix,
        far_is_u,
        far * near,
        far_panels * far_splits,
        far_splits,
        far_loops,
        near_panels * near_splits,
        near_splits,
        near_loops,
        *split_flat(far * near),
    )


def forward(items, like, order, eps):
    """items: for each layer the fields of SpectralForward (csrc/spectral_norm/spectral_norm.h), in
    their order, addresses of tensors on the device of `like`, whose dtype the weights have."""
    plans = [_plan(*item[1:4]) for item in items]
    length = sum(
        plan.far_splits * plan.matrix[0] + plan.near_splits * plan.matrix[1] for plan in plans
    )
    sums = torch.empty(length, dtype=ARITHMETIC[like.dtype], device=like.device)
    rows, even, odd, write = _rows(items, plans, order, eps, sums)
    steps = max(max(1, 2 * item[5]) for item in items)
    options = launch_options(like.dtype, len(items))
    with on_device(like):
        table = device_table(rows, like.device)
        for step in range(steps):
            is_odd = step % 2 == 1
            launch(
                spectral_norm_product,
                (odd if is_odd else even,),
                table,
                len(items),
                step,
                ODD=is_odd,
                FIRST=step == 0,
                **options,
            )
        aligned = are_aligned([address for item in items for address in (item[0], item[13])])
        launch(spectral_norm_write, (write,), table, len(items), ALIGNED=aligned, **options)


def _rows(items, plans, order, eps, sums):
    """(the table's rows, programs of an even step, of an odd one, of the write)"""
    eps_bits = double_bits(eps)
    at, size = sums.data_ptr(), sums.element_size()
    rows, even, odd, write = [], 0, 0, 0
    for item, plan in zip(items, plans, strict=True):
        weight, _, _, _, v_leading, iterations, wide = item[:7]
        u, v, store_u, store_v, new_u, new_v, normalized, sigma = item[7:]
        far, near = plan.matrix[:2]
        of_far = far, at, plan.far_splits, plan.far_loops
        at += plan.far_splits * far * size
        of_near = near, at, plan.near_splits, plan.near_loops
        at += plan.near_splits * near * size
        of_u, of_v = (of_far, of_near) if plan.far_is_u else (of_near, of_far)
        of_u = u, store_u, new_u, 1, *of_u
        of_v = v, store_v, new_v, v_leading, *of_v
        a, b = (of_v, of_u) if order == "u_first" else (of_u, of_v)
        even_makes_far = (order == "u_first") == plan.far_is_u
        rows.append(
            (
                even,
                odd,
                write,
                plan.write_loops,
                plan.elements,
                max(1, 2 * iterations),
                iterations,
                even_makes_far,
                wide,
                eps_bits,
                weight,
                normalized,
                sigma,
                *plan.matrix,
                *a,
                *b,
            )
        )
        even += plan.far_programs if even_makes_far else plan.near_programs
        odd += plan.near_programs if even_makes_far else plan.far_programs
        write += plan.write_programs
    return rows, even, odd, write
