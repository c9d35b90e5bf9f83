"""Gradients of spectral normalization, of all layers together:

    dW = dŴ/σ + (dσ - ⟨dŴ, Ŵ⟩/σ) u vᵀ

Two launches: partial sums of ⟨dŴ, Ŵ⟩ over flat pieces of memory (both lie as W does); then tiles of
dW, every program adding its layer's partial sums up, in order, first. Matrix: see layers.py.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from genkern.ops._device import device_table, on_device
from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton import launch
from genkern.ops.spectral_norm.triton.layers import (
    FLAT,
    FLAT_PROGRAMS,
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
)

# The fields of a layer's row.
FIRST_PRODUCT, FIRST_WRITE = tl.constexpr(0), tl.constexpr(1)
PRODUCT_LOOPS, WRITE_LOOPS, ELEMENTS = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
GRAD, NORMALIZED, SIGMA, GRAD_SIGMA = (tl.constexpr(i) for i in (5, 6, 7, 8))
GRAD_WEIGHT, PARTS, PART_COUNT = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
FAR, FAR_LEADING, NEAR, NEAR_LEADING = (tl.constexpr(i) for i in (12, 13, 14, 15))
MATRIX = tl.constexpr(16)
FIELDS = tl.constexpr(21)

ROWS, COLUMNS = tl.constexpr(32), tl.constexpr(64)  # of a tile of dW
MOST_PARTS = tl.constexpr(FLAT_PROGRAMS)


@triton.jit(do_not_specialize=["layers"])
def spectral_norm_inner_product(
    table, layers,
    T: tl.constexpr, ACC: tl.constexpr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, part = find_layer(table, layers, FIRST_PRODUCT, FIELDS, LAYERS)
    loops, elements = tl.load(row + PRODUCT_LOOPS), tl.load(row + ELEMENTS)
    grad_address = tl.load(row + GRAD)
    grad = pointer(grad_address, T, ALIGNED)
    normalized = pointer(tl.load(row + NORMALIZED), T, ALIGNED)
    total = tl.zeros((FLAT,), ACC)
    end = tl.where(grad_address != 0, elements, 0)
    for loop in range(0, loops):
        start = (part * loops + loop) * FLAT
        g = load_flat(grad, start, end).to(ACC)
        total += g * load_flat(normalized, start, end).to(ACC)
    tl.store(pointer(tl.load(row + PARTS), ACC, False) + part, tl.sum(total, 0))


@triton.jit(do_not_specialize=["layers"])
def spectral_norm_gradient(table, layers, T: tl.constexpr, ACC: tl.constexpr, LAYERS: tl.constexpr):
    row, tile = find_layer(table, layers, FIRST_WRITE, FIELDS, LAYERS)
    grad_address, grad_sigma_address = tl.load(row + GRAD), tl.load(row + GRAD_SIGMA)
    has_grad = grad_address != 0
    sigma = tl.load(pointer(tl.load(row + SIGMA), ACC, False))
    grad_sigma = tl.load(
        pointer(grad_sigma_address, ACC, False), mask=grad_sigma_address != 0, other=0.0
    )
    part = tl.arange(0, MOST_PARTS)
    parts = pointer(tl.load(row + PARTS), ACC, False)
    products = tl.load(parts + part, mask=part < tl.load(row + PART_COUNT), other=0.0)
    along = tl.where(has_grad, tl.sum(products, 0) / sigma, 0.0)
    factor = grad_sigma - along

    matrix = load_matrix(row + MATRIX)
    loops = tl.load(row + WRITE_LOOPS).to(tl.int32)
    panels = (matrix.far + ROWS - 1) // ROWS
    far = (tile % panels) * ROWS + tl.arange(0, ROWS)
    x = tl.load(
        pointer(tl.load(row + FAR), ACC, False)
        + own_index(far, tl.load(row + FAR_LEADING).to(tl.int32), matrix.far),
        mask=far < matrix.far,
        other=0.0,
    )
    near_vector, near_leading = (
        pointer(tl.load(row + NEAR), ACC, False),
        tl.load(row + NEAR_LEADING).to(tl.int32),
    )
    grad = pointer(grad_address, T, False)
    gradient = pointer(tl.load(row + GRAD_WEIGHT), T, False)
    far_with_grad = tl.where(has_grad, matrix.far, 0)
    first = (tile // panels) * loops * COLUMNS
    for start in range(first, tl.minimum(first + loops * COLUMNS, matrix.near), COLUMNS):
        near = start + tl.arange(0, COLUMNS)
        at_near = own_index(near, near_leading, matrix.near)
        y = tl.load(near_vector + at_near, mask=near < matrix.near, other=0.0)
        near_inside = (near < matrix.near)[None, :]
        at = (far * matrix.far_stride)[:, None] + near_offsets(matrix, near)[None, :]
        to_load = (far < far_with_grad)[:, None] & near_inside
        g = tl.load(grad + at, mask=to_load, other=0.0).to(ACC)
        of_grad = tl.where(has_grad, g / sigma, 0.0)
        result = of_grad + (factor * x)[:, None] * y[None, :]
        tl.store(gradient + at, result.to(T), mask=(far < matrix.far)[:, None] & near_inside)


class _Plan(NamedTuple):
    """How a layer is cut: everything in its row of the table that its layout alone decides."""

    matrix: tuple
    far_is_u: bool
    parts: int
    product_loops: int
    write_programs: int
    write_loops: int


@lru_cache(maxsize=4096)
def _plan(outer, rows, inner):
    matrix, far_is_u = matrix_of(outer, rows, inner)
    far, near = matrix[:2]
    panels, tiles = ceil_div(far, ROWS.value), ceil_div(near, COLUMNS.value)
    loops = max(1, min(ceil_div(panels * tiles, FLAT_PROGRAMS), tiles))
    write_programs = panels * ceil_div(tiles, loops)
    return _Plan(matrix, far_is_u, *split_flat(far * near), write_programs, loops)


def backward(items, like):
    """items: for each layer the fields of SpectralBackward (csrc/spectral_norm/spectral_norm.h), in
    their order, addresses of tensors on the device of `like`, whose dtype the weights have."""
    items = [item for item in items if item[2] * item[3] * item[4]]
    if not items:
        return
    plans = [_plan(*item[2:5]) for item in items]
    parts = torch.empty(
        sum(plan.parts for plan in plans), dtype=ARITHMETIC[like.dtype], device=like.device
    )
    at, size = parts.data_ptr(), parts.element_size()
    rows, products, write = [], 0, 0
    for item, plan in zip(items, plans, strict=True):
        grad, normalized, _, _, _, v_leading, u, v, sigma, grad_sigma, grad_weight = item
        of_u, of_v = (u, 1), (v, v_leading)
        far, near = plan.matrix[:2]
        rows.append(
            (
                products,
                write,
                plan.product_loops,
                plan.write_loops,
                far * near,
                grad,
                normalized,
                sigma,
                grad_sigma,
                grad_weight,
                at,
                plan.parts,
                *((*of_u, *of_v) if plan.far_is_u else (*of_v, *of_u)),
                *plan.matrix,
            )
        )
        products += plan.parts
        write += plan.write_programs
        at += plan.parts * size
    options = launch_options(like.dtype, len(items))
    with on_device(like):
        table = device_table(rows, like.device)
        aligned = are_aligned([address for item in items for address in item[:2]])
        launch(
            spectral_norm_inner_product,
            (products,),
            table,
            len(items),
            ALIGNED=aligned,
            **options,
        )
        launch(spectral_norm_gradient, (write,), table, len(items), **options)
