"""What forward mode and second order share in Triton: directions, and the tangents of logits.

    T_X = scale·(A·kᵀ + q·Bᵀ)        T = g∘T_X + β + κ

A, B, C: tangents of q, k, v; β, κ: of the bias and the key bias; what is None is zero, and left out
when a kernel is compiled. g = 1 - tanh²(X/softcap), or 1. Vocabulary: tiles.py, operands.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from genkern.ops.attention.triton.operands import add_pairing
from genkern.ops.attention.triton.tiles import (
    Bias,
    Heads,
    Numbers,
    add_bias,
    add_key_bias,
    number,
)


class Tangents(NamedTuple):
    """Of q, k, v, the bias and the key bias."""

    q: Heads
    k: Heads
    v: Heads
    bias: Bias
    key_bias: Numbers


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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """(T_X, T). `tanh`: the tile of tanh(X / softcap), of any value without softcap. The operands
    of missing tangents are never read."""
    A: tl.constexpr = tanh.dtype
    products = tl.zeros_like(tanh)
    if tangents.q.data is not None:
        products = add_pairing(
            products, q_tangent, k, QUERIES, KEYS, d, D, A, PRECISION, PIECE, KEYS_FIRST
        )
    if tangents.k.data is not None:
        products = add_pairing(
            products, q, k_tangent, QUERIES, KEYS, d, D, A, PRECISION, PIECE, KEYS_FIRST
        )
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
