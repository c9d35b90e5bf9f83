"""Attention, forward mode: the derivatives of out and lse along tangents of the inputs.

    T: the tangent of S (tangents.py)     τ = rowsum(P∘T)
    tangent of out = (Z∘P)·C + (Z∘P∘(T - τ))·v        tangent of lse = τ

One sweep over the keys of a block of queries, six products. T is centred by the mean of the keys
seen so far; where a tile moves that mean by Δ, the sums (Z∘P∘(T - mean))·v so far change by
-Δ·(Z∘P)·v. So no digits are lost where T has a large mean. Vocabulary: tiles.py,
operands.py, tangents.py.
"""

import triton
import triton.language as tl

from genkern.ops.attention.triton.operands import (
    WIDEST,
    key_operand,
    pairing,
    query_operand,
)
from genkern.ops.attention.triton.tangents import (
    step_of_mean,
    tangent_logits,
)
from genkern.ops.attention.triton.tiles import (
    add_product,
    dropout_tile,
    exponential,
    key_rows,
    key_span,
    load_tile,
    logits,
    query_block,
    query_numbers,
    query_rows,
    softmax_row,
    store_tile,
)


@triton.jit
def attention_jvp(
    problem,
    tangents,
    shifts,
    totals,
    out_tangent,
    lse_tangent,
    blocks,
    d: tl.constexpr,
    dv: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr = WIDEST,
):
    block, place = query_block(problem, blocks)
    i0 = block * QUERIES
    i = i0 + tl.arange(0, QUERIES)
    q = query_operand(problem.q, place, i0, QUERIES, d, D, PIECE)
    q_tangent = q
    if tangents.q.data is not None:
        q_tangent = query_operand(tangents.q, place, i0, QUERIES, d, D, PIECE)
    shift, inverse = softmax_row(shifts, totals, place, i)
    weight = tl.zeros([QUERIES], A)
    mean = tl.zeros([QUERIES], A)
    out = tl.zeros([QUERIES, DV], A)
    moved = tl.zeros([QUERIES, DV], A)
    v_rows = key_rows(problem.v, place)
    if tangents.v.data is not None:
        tangent_rows = key_rows(tangents.v, place)
    span = key_span(problem, place, i0, QUERIES, KEYS)
    for j0 in range(span[0], span[3], KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = key_operand(problem.k, place, j0, KEYS, d, D, PIECE)
        k_tangent = k
        if tangents.k.data is not None:
            k_tangent = key_operand(tangents.k, place, j0, KEYS, d, D, PIECE)
        v = load_tile(v_rows, problem.v.row, j0, place.keys, KEYS, dv, DV)
        products = pairing(q, k, QUERIES, KEYS, d, D, A, PRECISION, PIECE, False)
        s, tanh = logits(problem, place, products, i[:, None], j[None, :], True)
        p = exponential(problem, s - shift[:, None]) * inverse[:, None]
        _, t = tangent_logits(
            problem,
            tangents,
            place,
            q,
            q_tangent,
            k,
            k_tangent,
            tanh,
            i[:, None],
            j[None, :],
            QUERIES,
            KEYS,
            d,
            D,
            PRECISION,
            PIECE,
            False,
        )
        weight += tl.sum(p, 1)
        step = step_of_mean(p, weight, t, mean)
        mean += step
        if problem.seed is not None:
            p *= dropout_tile(problem, place, i, j0, KEYS, A)
        moved -= step[:, None] * out
        moved = add_product(moved, p * (t - mean[:, None]), v, A, PRECISION)
        out = add_product(out, p, v, A, PRECISION)
        if tangents.v.data is not None:
            v_tangent = load_tile(tangent_rows, tangents.v.row, j0, place.keys, KEYS, dv, DV)
            moved = add_product(moved, p, v_tangent, A, PRECISION)
    tl.store(query_numbers(lse_tangent, place) + i, mean, mask=i < place.queries)
    store_tile(
        query_rows(out_tangent, place), out_tangent.row, i0, place.queries, moved, QUERIES, dv, DV
    )
