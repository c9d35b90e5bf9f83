"""Attention: the gradient of a bias with rows and keys of its own, dS summed over the batch and the
heads that share it.

A program takes a tile of the bias and goes over what shares it, in order: no atomics. The levels
are backward.py's. (Where a bias is broadcast over queries, its gradient is column sums, which the
sweep by columns has; over keys, it is the row sums of dS, which are λ.) Vocabulary: tiles.py.
"""

import triton
import triton.language as tl

from genkern.ops.attention.triton.tiles import (
    dropout_tile,
    exponential,
    key_rows,
    key_span,
    load_tile,
    logits,
    place_of,
    product,
    query_numbers,
    query_rows,
    softmax_row,
)


@triton.jit
def attention_bias_gradient(
    problem,
    shifts,
    totals,
    grad_out,
    levels,
    grad_bias,
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
):
    key_blocks, row_blocks = tl.cdiv(problem.M, KEYS), tl.cdiv(problem.N, QUERIES)
    program = tl.program_id(0)
    j0 = program % key_blocks * KEYS
    i0 = program // key_blocks % row_blocks * QUERIES
    bias_head = program // key_blocks // row_blocks % heads_of_bias
    bias_batch = program // key_blocks // row_blocks // heads_of_bias
    i, j = i0 + tl.arange(0, QUERIES), j0 + tl.arange(0, KEYS)
    sums = tl.zeros([QUERIES, KEYS], A)
    for turn in range(batches_sharing * heads_sharing):
        batch = bias_batch * batches_sharing + turn // heads_sharing
        head = bias_head * heads_sharing + turn % heads_sharing
        place = place_of(problem, batch, head, head // (problem.H // problem.Hk))
        span = key_span(problem, place, i0, QUERIES, KEYS)
        if (j0 + KEYS > span[0]) & (j0 < span[3]):
            q = load_tile(
                query_rows(problem.q, place), problem.q.row, i0, place.queries, QUERIES, d, D
            )
            k = load_tile(key_rows(problem.k, place), problem.k.row, j0, place.keys, KEYS, d, D)
            products = product(q, tl.trans(k), A, PRECISION)
            s, _ = logits(problem, place, products, i[:, None], j[None, :], True)
            shift, inverse = softmax_row(shifts, totals, place, i)
            p = exponential(problem, s - shift[:, None]) * inverse[:, None]
            grad_rows = query_rows(grad_out, place)
            grad = load_tile(grad_rows, grad_out.row, i0, place.queries, QUERIES, dv, DV)
            v = load_tile(key_rows(problem.v, place), problem.v.row, j0, place.keys, KEYS, dv, DV)
            dp = product(grad, tl.trans(v), A, PRECISION)
            if problem.seed is not None:
                dp *= dropout_tile(problem, place, i, j0, KEYS, A)
            level = tl.load(query_numbers(levels, place) + i, mask=i < place.queries, other=0.0)
            sums += p * (dp - level[:, None])
    to = grad_bias.data + bias_batch.to(tl.int64) * grad_bias.batch
    to += bias_head.to(tl.int64) * grad_bias.head
    address = to + i.to(tl.int64)[:, None] * grad_bias.row + j.to(tl.int64)[None, :] * grad_bias.key
    tl.store(address, sums, mask=(i < problem.N)[:, None] & (j < problem.M)[None, :])
