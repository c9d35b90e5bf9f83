"""Rows of queries and of keys as operands of products, where four products meet in one program.

A tensor of more than PIECE features is multiplied in pieces of as many, read again for every tile:
whole, its rows would lie in registers all the time, and many wide ones spill. As in tiles.py a tile
of products is [queries, keys] or, KEYS_FIRST, [keys, queries].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from genkern.ops.attention.triton.tiles import (
    add_product,
    key_rows,
    load_tile,
    query_rows,
    tile_addresses,
)

WIDEST = 256  # a piece of so many features is the whole


class Operand(NamedTuple):
    """R rows of a head from row `first` on, zeros from row `end` on. tile: [R, D], or where it is
    multiplied in pieces nothing to be read."""

    rows: Any
    stride: Any
    first: Any
    end: Any
    tile: Any


@triton.jit
def query_operand(
    x, place, i0, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr
):
    """R rows of queries from i0 on."""
    return _operand(query_rows(x, place), x.row, i0, place.queries, R, d, D, PIECE)


@triton.jit
def key_operand(
    x, place, j0, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr
):
    """R rows of keys from j0 on."""
    return _operand(key_rows(x, place), x.row, j0, place.keys, R, d, D, PIECE)


@triton.jit
def _operand(
    rows, stride, first, end, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr
):
    tile = first
    if D <= PIECE:
        tile = load_tile(rows, stride, first, end, R, d, D)
    return Operand(rows, stride, first, end, tile)


@triton.jit
def tile_of(x, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """[R, D]"""
    return x.tile if D <= PIECE else load_tile(x.rows, x.stride, x.first, x.end, R, d, D)


@triton.jit
def pairing(
    of_queries,
    of_keys,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """of_queries·of_keysᵀ, or its transpose."""
    sums = tl.zeros([KEYS, QUERIES] if KEYS_FIRST else [QUERIES, KEYS], A)
    return add_pairing(
        sums, of_queries, of_keys, QUERIES, KEYS, d, D, A, PRECISION, PIECE, KEYS_FIRST
    )


@triton.jit
def add_pairing(
    sums,
    of_queries,
    of_keys,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """sums + of_queries·of_keysᵀ, or its transpose."""
    if D <= PIECE:
        sums = _add(sums, of_queries.tile, of_keys.tile, A, PRECISION, KEYS_FIRST)
    else:
        for column in range(0, D, PIECE):
            x = _piece(of_queries, column, QUERIES, d, PIECE)
            y = _piece(of_keys, column, KEYS, d, PIECE)
            sums = _add(sums, x, y, A, PRECISION, KEYS_FIRST)
    return sums


@triton.jit
def _add(sums, x, y, A: tl.constexpr, PRECISION: tl.constexpr, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        sums = add_product(sums, y, tl.trans(x), A, PRECISION)
    else:
        sums = add_product(sums, x, tl.trans(y), A, PRECISION)
    return sums


@triton.jit
def _piece(x, column, R: tl.constexpr, d: tl.constexpr, PIECE: tl.constexpr):
    """[R, PIECE], from a column on."""
    address = tile_addresses(x.rows + column, x.stride, x.first, R, PIECE)
    is_row = (x.first + tl.arange(0, R) < x.end)[:, None]
    is_column = (column + tl.arange(0, PIECE) < d)[None, :]
    return tl.load(address, mask=is_row & is_column, other=0.0)
