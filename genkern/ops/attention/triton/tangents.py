"""What forward mode and second order share in Triton: directions, and the tangents of logits.

    T_X = scale·(A·kᵀ + q·Bᵀ)        T = g∘T_X + β + κ

A, B, C: tangents of q, k, v; β, κ: of the bias and the key bias; what is None is zero, and left out
when a kernel is compiled. g = 1 - tanh²(X/softcap), or 1. As in tiles.py a tile is [queries, keys]
or, KEYS_FIRST, [keys, queries].
"""

from typing import NamedTuple

import triton
import triton.language as tl

from genkern.ops.attention.triton.tiles import (
    Bias,
    Heads,
    Numbers,
    add_bias,
    add_key_bias,
    add_product,
    key_rows,
    load_tile,
    number,
    product,
    query_rows,
)


class Tangents(NamedTuple):
    """Of q, k, v, the bias and the key bias."""

    q: Heads
    k: Heads
    v: Heads
    bias: Bias
    key_bias: Numbers


@triton.jit
def query_tile(x, place, i, d: tl.constexpr, D: tl.constexpr):
    """Rows i of queries as [n, D], zeros where there is none; None of None."""
    tile = None
    if x.data is not None:
        tile = load_tile(query_rows(x, place), x.row, i, place.queries, d, D, True)
    return tile


@triton.jit
def key_tile(x, place, j, d: tl.constexpr, D: tl.constexpr):
    """The same of keys."""
    tile = None
    if x.data is not None:
        tile = load_tile(key_rows(x, place), x.row, j, place.keys, d, D, True)
    return tile


@triton.jit
def pairing(
    of_queries, of_keys, A: tl.constexpr, PRECISION: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """of_queries·of_keysᵀ, or its transpose."""
    if KEYS_FIRST:
        products = product(of_keys, tl.trans(of_queries), A, PRECISION)
    else:
        products = product(of_queries, tl.trans(of_keys), A, PRECISION)
    return products


@triton.jit
def add_pairing(
    sums, of_queries, of_keys, A: tl.constexpr, PRECISION: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    if KEYS_FIRST:
        sums = add_product(sums, of_keys, tl.trans(of_queries), A, PRECISION)
    else:
        sums = add_product(sums, of_queries, tl.trans(of_keys), A, PRECISION)
    return sums


@triton.jit
def tangent_logits(
    problem,
    tangents,
    place,
    q,
    q_tangent,
    k,
    k_tangent,
    tanh,
    i,
    j,
    PRECISION: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """(T_X, T). `tanh`: the tile of tanh(X / softcap), of any value without softcap."""
    A: tl.constexpr = tanh.dtype
    if q_tangent is not None:
        products = pairing(q_tangent, k, A, PRECISION, KEYS_FIRST)
        if k_tangent is not None:
            products = add_pairing(products, q, k_tangent, A, PRECISION, KEYS_FIRST)
    elif k_tangent is not None:
        products = pairing(q, k_tangent, A, PRECISION, KEYS_FIRST)
    else:
        products = tl.zeros_like(tanh)
    t_x = products * number(problem.scale, A)
    t = t_x
    if problem.softcap is not None:
        t *= 1 - tanh * tanh
    if tangents.bias.data is not None:
        t = add_bias(t, tangents.bias, place, i, j)
    if tangents.key_bias.data is not None:
        t = add_key_bias(t, tangents.key_bias, place, j)
    return t_x, t


@triton.jit
def step_of_mean(weights, total, values, mean):
    """By how much the mean of every row moves when `values` with `weights` join it; total: of all
    weights until now, these included."""
    moved = tl.sum(weights * (values - mean[:, None]), 1)
    return moved / tl.where(total > 0, total, 1.0)
