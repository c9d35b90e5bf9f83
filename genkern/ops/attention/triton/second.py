"""Attention, second order: the gradients of ⟨backward(x, dO, λ), (A, B, C, β, κ)⟩.

    P, dP, δ, dS, g as in backward.py      T, T_X as in tangents.py      U = Z∘(dO·Cᵀ)
    τ = rowsum(P∘T)     E = (T - τ)∘(dP - δ + λ) + U      ρ = rowsum(P∘E)      W = P∘(E - ρ)
    h = -2·g·tanh(X/softcap)/softcap, or 0        W_X = g∘W + h∘dS∘T_X       dS_X = g∘dS

    q' = scale·(dS_X·B + W_X·k)     k' = scale·(dS_Xᵀ·A + W_Xᵀ·q)     v' = (Z∘P∘(T - τ))ᵀ·dO
    dO' = (Z∘P)·C + (Z∘P∘(T - τ))·v       λ' = τ       biases' = W, summed

Three sweeps without atomics: by rows for the numbers of a row, level = δ - λ, τ and ρ; by rows for
q' and dO'; by columns, as in backward.py, for k', v' and the column sums of W. The first is one
sweep: ρ is the covariance of T and dP under P, plus a mean of U, and where the means move the sum
of products so far moves by their product, so nothing is lost where T or dP have large means.
Products: 5, 9 and 8. Vocabulary: tiles.py, tangents.py.
"""

import triton
import triton.language as tl

from genkern.ops.attention.triton.bias_gradient import bias_tile, shared_place, store_bias_tile
from genkern.ops.attention.triton.operands import WIDEST, tile_of
from genkern.ops.attention.triton.second_tiles import (
    key_operands,
    load_row,
    pairs,
    query_operands,
    weights,
)
from genkern.ops.attention.triton.tangents import step_of_mean
from genkern.ops.attention.triton.tiles import (
    add_product,
    key_block,
    key_rows,
    key_span,
    number,
    place_of,
    query_block,
    query_numbers,
    query_rows,
    query_span,
    softmax_row,
    store_tile,
)


@triton.jit
def attention_second_stats(
    problem,
    tangents,
    shifts,
    totals,
    grad_out,
    grad_lse,
    levels,
    taus,
    rhos,
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
    inside = i < place.queries
    queries = query_operands(problem, tangents, grad_out, place, i0, QUERIES, d, dv, D, DV, PIECE)
    shift, inverse = softmax_row(shifts, totals, place, i)
    weight = tl.zeros([QUERIES], A)
    delta = tl.zeros([QUERIES], A)
    tau = tl.zeros([QUERIES], A)
    mean_u = tl.zeros([QUERIES], A)
    products = tl.zeros([QUERIES], A)
    span = key_span(problem, place, i0, QUERIES, KEYS)
    for j0 in range(span[0], span[3], KEYS):
        keys = key_operands(problem, tangents, place, j0, KEYS, d, dv, D, DV, PIECE)
        x = pairs(
            problem,
            tangents,
            place,
            queries,
            keys,
            shift,
            inverse,
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
            False,
        )
        weight_before = weight
        weight += tl.sum(x.p, 1)
        delta_step = step_of_mean(x.p, weight, x.dp, delta)
        tau_step = step_of_mean(x.p, weight, x.t, tau)
        delta += delta_step
        tau += tau_step
        mean_u += step_of_mean(x.p, weight, x.u, mean_u)
        products += weight_before * delta_step * tau_step
        products += tl.sum(x.p * ((x.dp - delta[:, None]) * (x.t - tau[:, None])), 1)
    rho = products / tl.where(weight > 0, weight, 1.0) + mean_u
    if grad_lse.data is not None:
        delta -= tl.load(query_numbers(grad_lse, place) + i, mask=inside, other=0.0)
    tl.store(query_numbers(levels, place) + i, delta, mask=inside)
    tl.store(query_numbers(taus, place) + i, tau, mask=inside)
    tl.store(query_numbers(rhos, place) + i, rho, mask=inside)


@triton.jit
def attention_second_rows(
    problem,
    tangents,
    shifts,
    totals,
    grad_out,
    levels,
    taus,
    rhos,
    of_q,
    of_out,
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
    queries = query_operands(problem, tangents, grad_out, place, i0, QUERIES, d, dv, D, DV, PIECE)
    row = load_row(shifts, totals, levels, taus, rhos, place, i)
    q_sums = tl.zeros([QUERIES, D], A)
    out_sums = tl.zeros([QUERIES, DV], A)
    span = key_span(problem, place, i0, QUERIES, KEYS)
    for j0 in range(span[0], span[3], KEYS):
        keys = key_operands(problem, tangents, place, j0, KEYS, d, dv, D, DV, PIECE)
        x = weights(
            problem,
            tangents,
            place,
            queries,
            keys,
            row,
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
            False,
        )
        if of_q.data is not None:
            q_sums = add_product(q_sums, x.w_x, tile_of(keys.k, KEYS, d, D, PIECE), A, PRECISION)
            if tangents.k.data is not None:
                q_sums = add_product(
                    q_sums, x.ds_x, tile_of(keys.k_tangent, KEYS, d, D, PIECE), A, PRECISION
                )
        if of_out.data is not None:
            out_sums = add_product(
                out_sums, x.kept_pt, tile_of(keys.v, KEYS, dv, DV, PIECE), A, PRECISION
            )
            if tangents.v.data is not None:
                out_sums = add_product(
                    out_sums, x.kept_p, tile_of(keys.v_tangent, KEYS, dv, DV, PIECE), A, PRECISION
                )
    if of_q.data is not None:
        q_sums *= number(problem.scale, A)
        store_tile(query_rows(of_q, place), of_q.row, i0, place.queries, q_sums, QUERIES, d, D)
    if of_out.data is not None:
        store_tile(
            query_rows(of_out, place), of_out.row, i0, place.queries, out_sums, QUERIES, dv, DV
        )


@triton.jit
def attention_second_columns(
    problem,
    tangents,
    shifts,
    totals,
    grad_out,
    levels,
    taus,
    rhos,
    of_k,
    of_v,
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
    PIECE: tl.constexpr = WIDEST,
):
    block, batch, kv_head = key_block(problem, blocks)
    j0 = block * KEYS
    j = j0 + tl.arange(0, KEYS)
    group = problem.H // problem.Hk
    place = place_of(problem, batch, kv_head * group, kv_head)
    keys = key_operands(problem, tangents, place, j0, KEYS, d, dv, D, DV, PIECE)
    k_sums = tl.zeros([KEYS, D], A)
    v_sums = tl.zeros([KEYS, DV], A)
    for member in range(group):
        place = place_of(problem, batch, kv_head * group + member, kv_head)
        totals_of_keys = tl.zeros([KEYS], A)
        span = query_span(problem, place, j0, QUERIES, KEYS)
        for i0 in range(span[0], span[3], QUERIES):
            i = i0 + tl.arange(0, QUERIES)
            queries = query_operands(
                problem, tangents, grad_out, place, i0, QUERIES, d, dv, D, DV, PIECE
            )
            row = load_row(shifts, totals, levels, taus, rhos, place, i)
            x = weights(
                problem,
                tangents,
                place,
                queries,
                keys,
                row,
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
                True,
            )
            if column_sums.data is not None:
                totals_of_keys += tl.sum(x.w, 1)
            if of_k.data is not None:
                k_sums = add_product(
                    k_sums, x.w_x, tile_of(queries.q, QUERIES, d, D, PIECE), A, PRECISION
                )
                if tangents.q.data is not None:
                    k_sums = add_product(
                        k_sums,
                        x.ds_x,
                        tile_of(queries.q_tangent, QUERIES, d, D, PIECE),
                        A,
                        PRECISION,
                    )
            if of_v.data is not None:
                v_sums = add_product(
                    v_sums, x.kept_pt, tile_of(queries.grad, QUERIES, dv, DV, PIECE), A, PRECISION
                )
        if column_sums.data is not None:
            to = column_sums.data + place.batch * column_sums.batch
            to += place.head * column_sums.head + place.first_key
            tl.store(to + j, totals_of_keys, mask=j < place.key_rows)
    if of_k.data is not None:
        k_sums *= number(problem.scale, A)
        store_tile(key_rows(of_k, place), of_k.row, j0, place.key_rows, k_sums, KEYS, d, D)
    if of_v.data is not None:
        store_tile(key_rows(of_v, place), of_v.row, j0, place.key_rows, v_sums, KEYS, dv, DV)


@triton.jit
def attention_second_bias(
    problem,
    tangents,
    shifts,
    totals,
    grad_out,
    levels,
    taus,
    rhos,
    of_bias,
    heads_of_bias,
    heads_sharing,
    batches_sharing,
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
    batch, head, i0, j0 = bias_tile(problem, heads_of_bias, QUERIES, KEYS)
    i, j = i0 + tl.arange(0, QUERIES), j0 + tl.arange(0, KEYS)
    sums = tl.zeros([QUERIES, KEYS], A)
    for turn in range(batches_sharing * heads_sharing):
        place = shared_place(problem, batch, head, turn, heads_sharing, batches_sharing)
        span = key_span(problem, place, i0, QUERIES, KEYS)
        if (j0 + KEYS > span[0]) & (j0 < span[3]):
            queries = query_operands(
                problem, tangents, grad_out, place, i0, QUERIES, d, dv, D, DV, PIECE
            )
            keys = key_operands(problem, tangents, place, j0, KEYS, d, dv, D, DV, PIECE)
            row = load_row(shifts, totals, levels, taus, rhos, place, i)
            x = weights(
                problem,
                tangents,
                place,
                queries,
                keys,
                row,
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
                False,
            )
            sums += x.w
    store_bias_tile(problem, of_bias, batch, head, i, j, sums)
