"""Rows of queries and of keys as operands of products, where four products meet in one program.

A tensor of more than PIECE features is multiplied in pieces of as many, read again for every tile:
whole, its rows would lie in registers all the time, and many wide ones spill. As in tiles.py a tile
of products is [queries, keys] or, KEYS_FIRST, [keys, queries].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from genkern.ops.attention.triton.tiles import add_product, key_rows, load_tile, query_rows

WIDEST = 256  # a piece of so many features is the whole


class Operand(NamedTuple):
    """Rows `at` of a head, zeros from row `end` on. tile: [n, D], or None where it is multiplied in
    pieces."""

    rows: Any
    stride: Any
    at: Any
    end: Any
    tile: Any


@triton.jit
def query_operand(x, place, i, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """Rows i of queries; None of None."""
    operand = None
    if x.data is not None:
        operand = _operand(query_rows(x, place), x.row, i, place.queries, d, D, PIECE)
    return operand


@triton.jit
def key_operand(x, place, j, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """Rows j of keys; None of None."""
    operand = None
    if x.data is not None:
        operand = _operand(key_rows(x, place), x.row, j, place.keys, d, D, PIECE)
    return operand


@triton.jit
def _operand(rows, stride, at, end, d: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    tile = None
    if D <= PIECE:
        tile = load_tile(rows, stride, at, end, d, D, True)
    return Operand(rows, stride, at, end, tile)


@triton.jit
def tile_of(x, d: tl.constexpr, D: tl.constexpr):
    """[n, D]"""
    return x.tile if x.tile is not None else load_tile(x.rows, x.stride, x.at, x.end, d, D, True)


@triton.jit
def pairing(
    of_queries,
    of_keys,
    d: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """of_queries·of_keysᵀ, or its transpose."""
    if KEYS_FIRST:
        sums = tl.zeros([of_keys.at.shape[0], of_queries.at.shape[0]], A)
    else:
        sums = tl.zeros([of_queries.at.shape[0], of_keys.at.shape[0]], A)
    return add_pairing(sums, of_queries, of_keys, d, D, A, PRECISION, PIECE, KEYS_FIRST)


@triton.jit
def add_pairing(
    sums,
    of_queries,
    of_keys,
    d: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """sums + of_queries·of_keysᵀ, or its transpose."""
    if of_queries.tile is not None:
        sums = _add(sums, of_queries.tile, of_keys.tile, A, PRECISION, KEYS_FIRST)
    else:
        for first in range(0, D, PIECE):
            x = _piece(of_queries, first, d, PIECE)
            y = _piece(of_keys, first, d, PIECE)
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
def _piece(x, first, d: tl.constexpr, PIECE: tl.constexpr):
    column = first + tl.arange(0, PIECE)
    address = x.rows + x.at.to(tl.int64)[:, None] * x.stride + column[None, :]
    return tl.load(address, mask=(x.at < x.end)[:, None] & (column < d)[None, :], other=0.0)
