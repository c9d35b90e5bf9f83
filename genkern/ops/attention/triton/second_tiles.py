"""What the sweeps of second order know of a tile of queries and keys (formulas: second.py).

Vocabulary: tiles.py, operands.py, tangents.py. The numbers of a row are [n], tiles are
[queries, keys] or, KEYS_FIRST, [keys, queries].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from genkern.ops.attention.triton.operands import key_operand, pairing, query_operand
from genkern.ops.attention.triton.tangents import tangent_logits
from genkern.ops.attention.triton.tiles import (
    dropout_tile,
    exponential,
    logits,
    number,
    query_numbers,
    softmax_row,
)


class Queries(NamedTuple):
    """Rows of q, of its tangent and of dO."""

    q: Any
    q_tangent: Any
    grad: Any


class Keys(NamedTuple):
    k: Any
    k_tangent: Any
    v: Any
    v_tangent: Any


class Row(NamedTuple):
    """What is known of every query: P = exp(S - shift)·inverse, level = δ - λ, τ, ρ."""

    shift: Any
    inverse: Any
    level: Any
    tau: Any
    rho: Any


class Pairs(NamedTuple):
    """Tiles that pair queries with keys; kept: Z, not
    read without dropout."""

    p: Any
    kept: Any
    dp: Any
    u: Any
    t: Any
    t_x: Any
    tanh: Any


class Weights(NamedTuple):
    """What the products with rows weigh them by."""

    ds_x: Any
    w: Any
    w_x: Any
    kept_p: Any
    kept_pt: Any


@triton.jit
def query_operands(
    problem,
    tangents,
    grad_out,
    place,
    i0,
    QUERIES: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECE: tl.constexpr,
):
    q = query_operand(problem.q, place, i0, QUERIES, d, D, PIECE)
    grad = query_operand(grad_out, place, i0, QUERIES, dv, DV, PIECE)
    q_tangent = q  # not read where there is none
    if tangents.q.data is not None:
        q_tangent = query_operand(tangents.q, place, i0, QUERIES, d, D, PIECE)
    return Queries(q, q_tangent, grad)


@triton.jit
def key_operands(
    problem,
    tangents,
    place,
    j0,
    KEYS: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECE: tl.constexpr,
):
    k = key_operand(problem.k, place, j0, KEYS, d, D, PIECE)
    v = key_operand(problem.v, place, j0, KEYS, dv, DV, PIECE)
    k_tangent, v_tangent = k, v
    if tangents.k.data is not None:
        k_tangent = key_operand(tangents.k, place, j0, KEYS, d, D, PIECE)
    if tangents.v.data is not None:
        v_tangent = key_operand(tangents.v, place, j0, KEYS, dv, DV, PIECE)
    return Keys(k, k_tangent, v, v_tangent)


@triton.jit
def along_queries(x, KEYS_FIRST: tl.constexpr):
    """A number for every query, to go with a tile."""
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit
def pairs(
    problem,
    tangents,
    place,
    queries,
    keys,
    shift,
    inverse,
    i0,
    j0,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """`Pairs` of the queries from i0 on and the keys from j0 on."""
    i = i0 + tl.arange(0, QUERIES)
    i_of_tile = along_queries(i, KEYS_FIRST)
    j_of_tile = along_queries(j0 + tl.arange(0, KEYS), not KEYS_FIRST)
    products = pairing(queries.q, keys.k, QUERIES, KEYS, d, D, A, PRECISION, PIECE, KEYS_FIRST)
    s, tanh = logits(problem, place, products, i_of_tile, j_of_tile, True)
    p = exponential(problem, s - along_queries(shift, KEYS_FIRST))
    p *= along_queries(inverse, KEYS_FIRST)
    t_x, t = tangent_logits(
        problem,
        tangents,
        place,
        queries.q,
        queries.q_tangent,
        keys.k,
        keys.k_tangent,
        tanh,
        i_of_tile,
        j_of_tile,
        QUERIES,
        KEYS,
        d,
        D,
        PRECISION,
        PIECE,
        KEYS_FIRST,
    )
    dp = pairing(queries.grad, keys.v, QUERIES, KEYS, dv, DV, A, PRECISION, PIECE, KEYS_FIRST)
    u = tl.zeros_like(dp)
    if tangents.v.data is not None:
        u = pairing(
            queries.grad, keys.v_tangent, QUERIES, KEYS, dv, DV, A, PRECISION, PIECE, KEYS_FIRST
        )
    kept = p
    if problem.seed is not None:
        kept = dropout_tile(problem, place, i, j0, KEYS, A)
        if KEYS_FIRST:
            kept = tl.trans(kept)
        dp *= kept
        u *= kept
    return Pairs(p, kept, dp, u, t, t_x, tanh)


@triton.jit
def load_row(shifts, totals, levels, taus, rhos, place, i):
    shift, inverse = softmax_row(shifts, totals, place, i)
    inside = i < place.queries
    level = tl.load(query_numbers(levels, place) + i, mask=inside, other=0.0)
    tau = tl.load(query_numbers(taus, place) + i, mask=inside, other=0.0)
    rho = tl.load(query_numbers(rhos, place) + i, mask=inside, other=0.0)
    return Row(shift, inverse, level, tau, rho)


@triton.jit
def weights(
    problem,
    tangents,
    place,
    queries,
    keys,
    row,
    i0,
    j0,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """`Weights` of the queries from i0 on and the keys from j0 on."""
    x = pairs(
        problem,
        tangents,
        place,
        queries,
        keys,
        row.shift,
        row.inverse,
        i0,
        j0,
        QUERIES,
        KEYS,
        d,
        dv,
        D,
        DV,
        A,
        PRECISION,
        PIECE,
        KEYS_FIRST,
    )
    dp = x.dp - along_queries(row.level, KEYS_FIRST)
    t = x.t - along_queries(row.tau, KEYS_FIRST)
    ds = x.p * dp
    w = x.p * (t * dp + x.u - along_queries(row.rho, KEYS_FIRST))
    w_x = w
    if problem.softcap is not None:
        slope = 1 - x.tanh * x.tanh
        ds *= slope
        w_x = w * slope + ds * x.tanh * (-2 / number(problem.softcap, A)) * x.t_x
    kept_p = x.p
    if problem.seed is not None:
        kept_p = x.p * x.kept
    return Weights(ds, w, w_x, kept_p, kept_p * t)
