"""Attention, forward: out = (Z∘P)·v, lse, and of every row the shift and sum of its softmax.

A program takes a block of queries of one head and goes over the tiles of keys that they see, with
the online softmax (Milakov & Gimelshein 2018): when a tile brings a larger logit, what was summed
so far is scaled down to it. Vocabulary: tiles.py.
"""

import triton
import triton.language as tl

from genkern.ops.attention.triton.tiles import (
    LN_2,
    add_product,
    dropout_tile,
    exponential,
    is_edge,
    key_rows,
    key_span,
    load_tile,
    logits,
    number,
    product,
    query_block,
    query_numbers,
    query_rows,
    store_tile,
)


@triton.jit
def attention_forward(
    problem,
    out,
    shifts,
    totals,
    lse,
    blocks,
    d: tl.constexpr,
    dv: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, place = query_block(problem, blocks)
    i0 = block * QUERIES
    i = i0 + tl.arange(0, QUERIES)
    q = load_tile(query_rows(problem.q, place), problem.q.row, i0, place.queries, QUERIES, d, D)
    k_rows, v_rows = key_rows(problem.k, place), key_rows(problem.v, place)
    highest = tl.full([QUERIES], float("-inf"), A)
    total = tl.zeros([QUERIES], A)
    sums = tl.zeros([QUERIES, DV], A)
    span = key_span(problem, place, i0, QUERIES, KEYS)
    for j0 in range(span[0], span[3], KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = load_tile(k_rows, problem.k.row, j0, place.keys, KEYS, d, D)
        products = product(q, tl.trans(k), A, PRECISION)
        s, _ = logits(problem, place, products, i[:, None], j[None, :], is_edge(span, j0))
        shift = tl.maximum(highest, tl.max(s, 1))
        # Where nothing was seen yet: not -inf - -inf.
        shift_or_0 = tl.where(shift == float("-inf"), 0.0, shift)
        p = exponential(problem, s - shift_or_0[:, None])
        shrink = exponential(problem, highest - shift_or_0)
        total = total * shrink + tl.sum(p, 1)
        highest = shift
        if problem.seed is not None:
            p *= dropout_tile(problem, place, i, j0, KEYS, A)
        v = load_tile(v_rows, problem.v.row, j0, place.keys, KEYS, dv, DV)
        sums = add_product(sums * shrink[:, None], p, v, A, PRECISION)
    inside = i < place.queries
    is_empty = highest == float("-inf")
    shift = tl.where(is_empty, 0.0, highest)
    tl.store(query_numbers(shifts, place) + i, shift, mask=inside)
    tl.store(query_numbers(totals, place) + i, total, mask=inside)
    if lse.data is not None:
        of_shift = shift * (number(problem.exponent, A) * LN_2)
        values = tl.where(is_empty, float("-inf"), of_shift + tl.log2(total) * LN_2)
        tl.store(query_numbers(lse, place) + i, values, mask=inside)
    sums = sums * tl.where(total > 0, 1 / total, 0.0)[:, None]
    store_tile(query_rows(out, place), out.row, i0, place.queries, sums, QUERIES, dv, DV)
