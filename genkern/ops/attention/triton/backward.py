"""Attention, backward: the gradients of q, k, v, and the column sums of dS that biases need.

    P = exp(S - shift) / sum    dP = Z∘(dO·vᵀ)    δ = rowsum(P∘dP)    dS = P∘(dP - δ + λ)
    g = 1 - tanh²(X/softcap), or 1        λ: the cotangent of lse
    dq = scale·(g∘dS)·k     dk = scale·(g∘dS)ᵀ·q     dv = (Z∘P)ᵀ·dO

Two sweeps, neither with atomics. By rows, a program a block of queries: a first loop over its keys
gives level = δ - λ, which is written, the second dq. By columns, a program a block of keys: it goes
over the queries that see them, of all heads that share the keys, and has dk, dv whole at the end.
δ is the sum of the very numbers that are multiplied: as rowsum(dO∘O) with a rounded O it would cost
digits where a softmax is peaked. Nine products. Vocabulary: tiles.py.
"""

import triton
import triton.language as tl

from genkern.ops.attention.triton.tiles import (
    add_product,
    dropout_tile,
    exponential,
    is_edge,
    key_block,
    key_rows,
    key_span,
    load_tile,
    logits,
    number,
    place_of,
    product,
    query_block,
    query_numbers,
    query_rows,
    query_span,
    softmax_row,
    store_tile,
)


@triton.jit
def attention_backward_rows(
    problem,
    shifts,
    totals,
    grad_out,
    grad_lse,
    levels,
    grad_q,
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
    inside = i < place.queries
    q = load_tile(query_rows(problem.q, place), problem.q.row, i0, place.queries, QUERIES, d, D)
    grad = load_tile(query_rows(grad_out, place), grad_out.row, i0, place.queries, QUERIES, dv, DV)
    shift, inverse = softmax_row(shifts, totals, place, i)
    k_rows, v_rows = key_rows(problem.k, place), key_rows(problem.v, place)
    span = key_span(problem, place, i0, QUERIES, KEYS)

    level = tl.zeros([QUERIES], A)
    for j0 in range(span[0], span[3], KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = load_tile(k_rows, problem.k.row, j0, place.keys, KEYS, d, D)
        v = load_tile(v_rows, problem.v.row, j0, place.keys, KEYS, dv, DV)
        products = product(q, tl.trans(k), A, PRECISION)
        s, _ = logits(problem, place, products, i[:, None], j[None, :], is_edge(span, j0))
        p = exponential(problem, s - shift[:, None]) * inverse[:, None]
        dp = product(grad, tl.trans(v), A, PRECISION)
        if problem.seed is not None:
            dp *= dropout_tile(problem, place, i, j0, KEYS, A)
        level += tl.sum(p * dp, 1)
    if grad_lse.data is not None:
        level -= tl.load(query_numbers(grad_lse, place) + i, mask=inside, other=0.0)
    tl.store(query_numbers(levels, place) + i, level, mask=inside)

    if grad_q.data is not None:
        sums = tl.zeros([QUERIES, D], A)
        for j0 in range(span[0], span[3], KEYS):
            j = j0 + tl.arange(0, KEYS)
            k = load_tile(k_rows, problem.k.row, j0, place.keys, KEYS, d, D)
            v = load_tile(v_rows, problem.v.row, j0, place.keys, KEYS, dv, DV)
            products = product(q, tl.trans(k), A, PRECISION)
            s, t = logits(problem, place, products, i[:, None], j[None, :], is_edge(span, j0))
            p = exponential(problem, s - shift[:, None]) * inverse[:, None]
            dp = product(grad, tl.trans(v), A, PRECISION)
            if problem.seed is not None:
                dp *= dropout_tile(problem, place, i, j0, KEYS, A)
            ds = p * (dp - level[:, None])
            if problem.softcap is not None:
                ds *= 1 - t * t
            sums = add_product(sums, ds, k, A, PRECISION)
        sums *= number(problem.scale, A)
        store_tile(query_rows(grad_q, place), grad_q.row, i0, place.queries, sums, QUERIES, d, D)


@triton.jit
def attention_backward_columns(
    problem,
    shifts,
    totals,
    grad_out,
    levels,
    grad_k,
    grad_v,
    column_sums,
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
    block, batch, kv_head = key_block(problem, blocks)
    j0 = block * KEYS
    j = j0 + tl.arange(0, KEYS)
    group = problem.H // problem.Hk
    place = place_of(problem, batch, kv_head * group, kv_head)
    k = load_tile(key_rows(problem.k, place), problem.k.row, j0, place.keys, KEYS, d, D)
    v = load_tile(key_rows(problem.v, place), problem.v.row, j0, place.keys, KEYS, dv, DV)
    k_sums = tl.zeros([KEYS, D], A)
    v_sums = tl.zeros([KEYS, DV], A)
    for member in range(group):
        place = place_of(problem, batch, kv_head * group + member, kv_head)
        q_rows, grad_rows = query_rows(problem.q, place), query_rows(grad_out, place)
        totals_of_keys = tl.zeros([KEYS], A)
        span = query_span(problem, place, j0, QUERIES, KEYS)
        for i0 in range(span[0], span[3], QUERIES):
            i = i0 + tl.arange(0, QUERIES)
            q = load_tile(q_rows, problem.q.row, i0, place.queries, QUERIES, d, D)
            grad = load_tile(grad_rows, grad_out.row, i0, place.queries, QUERIES, dv, DV)
            products = product(k, tl.trans(q), A, PRECISION)
            s, t = logits(problem, place, products, i[None, :], j[:, None], is_edge(span, i0))
            shift, inverse = softmax_row(shifts, totals, place, i)
            p = exponential(problem, s - shift[None, :]) * inverse[None, :]
            dp = product(v, tl.trans(grad), A, PRECISION)
            kept_p = p
            if problem.seed is not None:
                z = tl.trans(dropout_tile(problem, place, i, j0, KEYS, A))
                dp *= z
                kept_p = p * z
            if grad_v.data is not None:
                v_sums = add_product(v_sums, kept_p, grad, A, PRECISION)
            level = tl.load(query_numbers(levels, place) + i, mask=i < place.queries, other=0.0)
            ds = p * (dp - level[None, :])
            if column_sums.data is not None:
                totals_of_keys += tl.sum(ds, 1)
            if problem.softcap is not None:
                ds *= 1 - t * t
            if grad_k.data is not None:
                k_sums = add_product(k_sums, ds, q, A, PRECISION)
        if column_sums.data is not None:
            to = column_sums.data + place.batch * column_sums.batch
            to += place.head * column_sums.head + place.first_key
            tl.store(to + j, totals_of_keys, mask=j < place.key_rows)
    if grad_k.data is not None:
        k_sums *= number(problem.scale, A)
        store_tile(key_rows(grad_k, place), grad_k.row, j0, place.key_rows, k_sums, KEYS, d, D)
    if grad_v.data is not None:
        store_tile(key_rows(grad_v, place), grad_v.row, j0, place.key_rows, v_sums, KEYS, dv, DV)
