"""The vocabulary of attention's Triton kernels: where a program stands, tiles of rows, logits, P.

    X = scale·q·kᵀ      S = softcap·tanh(X/softcap) + bias + key_bias      P = exp(S - shift) / sum

Layout. A tile of logits is [queries, keys] in a sweep over keys (forward, dq, …) and [keys,
queries] in a sweep over queries (dk, dv, …); what works on both takes i and j, the places of
queries and keys in their sequence, as [n, 1] or [1, n]. Places are 32-bit, offsets 64-bit. `shift`
and `sum` are what the forward keeps of a row (csrc/attention/attention.h): without softcap and bias
("plain") the shift is in units of |scale|, S = |scale|·(sign·q·k), and the largest P is exactly 1.

Kernels take a `Problem`, of nested tuples: what is None in it is left out when they are compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Heads(NamedTuple):
    """A tensor [B, heads, rows, features]: address and strides; the last dimension is dense."""

    data: Any
    batch: Any
    head: Any
    row: Any


class Numbers(NamedTuple):
    """A number for every row of every head, [B, heads, rows]."""

    data: Any
    batch: Any
    head: Any


class Bias(NamedTuple):
    """[B, H, N, M], strides 0 where it is broadcast. int8: 0 hides a key."""

    data: Any
    batch: Any
    head: Any
    row: Any
    key: Any


class Problem(NamedTuple):
    """What every kernel is given. H and Hk: heads of q and of k, v. N and M: rows of q and of k, v.
    left and right: how many keys beside its own place a query sees. dropped_below: words of Philox.
    The last seven are doubles as bits, because Triton passes a float as fp32 (see `number`)."""

    q: Heads
    k: Heads
    v: Heads
    bias: Bias
    key_bias: Numbers
    key_lengths: Any
    q_starts: Any
    k_starts: Any
    seed: Any
    dropped_below: Any
    H: Any
    Hk: Any
    N: Any
    M: Any
    left: Any
    right: Any
    lower_right: Any
    scale: Any
    sign: Any
    magnitude: Any  # of the scale; None: plain
    softcap: Any
    magnitude_by_softcap: Any
    exponent: Any  # what S - shift is multiplied by to be an argument of exp2
    kept: Any  # 1 / (1 - p)


@triton.jit
def number(bits, A: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(A)


# ---- Where a program stands ---------------------------------------------------------------------


class Place(NamedTuple):
    """One head of one sequence: `queries` rows from first_query on; of `key_rows` keys from
    first_key on `keys` may be seen. offset: where among the keys query 0 stands."""

    batch: Any
    head: Any
    kv_head: Any
    first_query: Any
    first_key: Any
    queries: Any
    keys: Any
    key_rows: Any
    offset: Any


@triton.jit
def clamped(x, upper):
    return tl.minimum(tl.maximum(x, 0), upper)


@triton.jit
def place_of(problem, batch, head, kv_head):
    batch, head, kv_head = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    first_query = batch * 0
    first_key = batch * 0
    queries = problem.N + tl.zeros((), tl.int32)
    key_rows = problem.M + tl.zeros((), tl.int32)
    if problem.q_starts is not None:
        # Kept inside of the tensors: on a GPU nobody has looked at the values.
        first_query = clamped(tl.load(problem.q_starts + batch), problem.N)
        first_key = clamped(tl.load(problem.k_starts + batch), problem.M)
        end_query = clamped(tl.load(problem.q_starts + batch + 1), problem.N)
        end_key = clamped(tl.load(problem.k_starts + batch + 1), problem.M)
        queries = tl.maximum(end_query - first_query, 0).to(tl.int32)
        key_rows = tl.maximum(end_key - first_key, 0).to(tl.int32)
    keys = key_rows
    if problem.key_lengths is not None:
        keys = clamped(tl.load(problem.key_lengths + batch), key_rows).to(tl.int32)
    offset = key_rows * 0
    if problem.lower_right is not None:
        offset = key_rows - queries
    return Place(batch, head, kv_head, first_query, first_key, queries, keys, key_rows, offset)


@triton.jit
def query_block(problem, blocks):
    """(number of the block, place) of a program that works on a block of queries; the last blocks,
    which see the most under a causal mask, begin."""
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = (program // blocks) % problem.H
    batch = program // blocks // problem.H
    return block, place_of(problem, batch, head, head // (problem.H // problem.Hk))


@triton.jit
def key_block(problem, blocks):
    """(number of the block, batch, key head) of a program that works on a block of keys; the first
    blocks, which most queries see under a causal mask, begin."""
    program = tl.program_id(0)
    head = program // blocks
    return program % blocks, head // problem.Hk, head % problem.Hk


@triton.jit
def key_span(problem, place, i0, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """(a, b, c, d): the keys that some of the block's queries see are in the tiles from a to d, and
    those from b to c are seen by all of them."""
    end = tl.minimum(i0 + QUERIES, place.queries)
    first = i0 * 0
    full_first = i0 * 0
    last = place.keys
    full_last = place.keys
    if problem.left is not None:
        first = tl.maximum(i0 + place.offset - problem.left, 0) // KEYS * KEYS
        full_first = tl.cdiv(tl.maximum(end - 1 + place.offset - problem.left, 0), KEYS) * KEYS
    if problem.right is not None:
        last = tl.minimum(last, end + place.offset + problem.right)
        full_last = tl.minimum(full_last, i0 + place.offset + problem.right + 1)
    last = tl.where(i0 < place.queries, tl.maximum(last, first), first)
    full_first = tl.minimum(full_first, tl.cdiv(last, KEYS) * KEYS)
    full_last = tl.maximum(full_last // KEYS * KEYS, full_first)
    full_last = tl.minimum(full_last, tl.maximum(last // KEYS * KEYS, full_first))
    return first, full_first, full_last, last


@triton.jit
def query_span(problem, place, j0, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The same of the queries that see some, or all, of a block of keys."""
    end = tl.minimum(j0 + KEYS, place.keys)
    first = j0 * 0
    full_first = j0 * 0
    last = place.queries
    full_last = place.queries
    if problem.right is not None:
        first = tl.maximum(j0 - place.offset - problem.right, 0) // QUERIES * QUERIES
        full_first = tl.cdiv(tl.maximum(end - 1 - place.offset - problem.right, 0), QUERIES)
        full_first = full_first * QUERIES
    if problem.left is not None:
        last = tl.minimum(last, end - place.offset + problem.left)
        full_last = tl.minimum(full_last, j0 - place.offset + problem.left + 1)
    last = tl.where(j0 < place.keys, tl.maximum(last, first), first)
    full_last = tl.where(j0 + KEYS <= place.keys, full_last, 0)
    full_first = tl.minimum(full_first, tl.cdiv(last, QUERIES) * QUERIES)
    full_last = tl.maximum(full_last // QUERIES * QUERIES, full_first)
    full_last = tl.minimum(full_last, tl.maximum(last // QUERIES * QUERIES, full_first))
    return first, full_first, full_last, last


# ---- Rows ---------------------------------------------------------------------------------------


@triton.jit
def query_rows(x, place):
    return x.data + place.batch * x.batch + place.head * x.head + place.first_query * x.row


@triton.jit
def key_rows(x, place):
    return x.data + place.batch * x.batch + place.kv_head * x.head + place.first_key * x.row


@triton.jit
def query_numbers(x, place):
    return x.data + place.batch * x.batch + place.head * x.head + place.first_query


@triton.jit
def key_numbers(x, place):
    return x.data + place.batch * x.batch + place.kv_head * x.head + place.first_key


@triton.jit
def tile_addresses(rows, stride, first, R: tl.constexpr, D: tl.constexpr):
    """Of [R, D] from row `first` on. Only the first row's offset is 64-bit, and computed for the
    whole tile: launch.py sees to it that a tile's own offsets fit into 32."""
    offset = tl.arange(0, R)[:, None] * stride + tl.arange(0, D)[None, :]
    return rows + tl.cast(first, tl.int64) * stride + offset


@triton.jit
def load_tile(rows, stride, first, end, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """R rows from `first` on as [R, D], zeros beyond row `end` and beyond feature d."""
    address = tile_addresses(rows, stride, first, R, D)
    is_row = (first + tl.arange(0, R) < end)[:, None]
    if d == D:
        tile = tl.load(address, mask=is_row, other=0.0)
    else:
        tile = tl.load(address, mask=is_row & (tl.arange(0, D) < d)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(rows, stride, first, end, tile, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    address = tile_addresses(rows, stride, first, R, D)
    mask = (first + tl.arange(0, R) < end)[:, None] & (tl.arange(0, D) < d)[None, :]
    tl.store(address, tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, A: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=A)


@triton.jit
def add_product(sums, a, b, A: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a·b, a rounded to b's dtype."""
    return tl.dot(a.to(b.dtype), b, sums, input_precision=PRECISION, out_dtype=A)


# ---- Logits -------------------------------------------------------------------------------------


@triton.jit
def is_hidden(problem, place, i, j):
    hidden = j >= place.keys
    if problem.left is not None:
        hidden = hidden | (j < i + place.offset - problem.left)
    if problem.right is not None:
        hidden = hidden | (j > i + place.offset + problem.right)
    return hidden


@triton.jit
def add_bias(s, bias, place, i, j):
    """s + bias; a boolean one hides."""
    rows = bias.data + place.batch * bias.batch + place.head * bias.head
    address = rows + i.to(tl.int64) * bias.row + j.to(tl.int64) * bias.key
    inside = (i < place.queries) & (j < place.keys)
    if bias.data.dtype.element_ty == tl.int8:
        seen = tl.load(address, mask=inside, other=1)
        s = tl.where(seen != 0, s, float("-inf"))
    else:
        s += tl.load(address, mask=inside, other=0.0).to(s.dtype)
    return s


@triton.jit
def add_key_bias(s, key_bias, place, j):
    return s + tl.load(key_numbers(key_bias, place) + j, mask=j < place.keys, other=0.0)


@triton.jit
def is_edge(span, first):
    """Whether the tile that begins there may have hidden keys."""
    return (first < span[1]) | (first >= span[2])


@triton.jit
def logits(problem, place, products, i, j, at_edge):
    """(S, or in its plain form S / |scale|; tanh(X / softcap)) of products q·k. The second is
    garbage without a softcap. at_edge: see `is_edge`. Asking it when a tile is reached takes fewer
    registers, and no more time, than a loop of its own for the tiles within."""
    A: tl.constexpr = products.dtype
    s = products * number(problem.sign, A)
    t = s
    if problem.softcap is not None:
        t = tanh(s * number(problem.magnitude_by_softcap, A))
        s = t * number(problem.softcap, A)
    elif problem.magnitude is not None:
        s = s * number(problem.magnitude, A)
    if problem.bias.data is not None:
        s = add_bias(s, problem.bias, place, i, j)
    if problem.key_bias.data is not None:
        s = add_key_bias(s, problem.key_bias, place, j)
    if at_edge:
        s = tl.where(is_hidden(problem, place, i, j), float("-inf"), s)
    return s, t


@triton.jit
def exponential(problem, z):
    """exp of differences of logits as `logits` gives them."""
    return tl.exp2(z * number(problem.exponent, z.dtype))


@triton.jit
def softmax_row(shift, total, place, i):
    """(shift, 1 / sum) of queries i; zeros where nothing is seen, so that P = 0 there, and beyond
    the last query."""
    inside = i < place.queries
    shift = tl.load(query_numbers(shift, place) + i, mask=inside, other=0.0)
    total = tl.load(query_numbers(total, place) + i, mask=inside, other=0.0)
    return shift, tl.where(total > 0, 1 / total, 0.0)


@triton.jit
def tanh(x):
    """By exp; near 0, where that cancels, by the series."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    if x.dtype == tl.float64:
        return far
    y = x * x
    near = -1382 / 155925 * y + 62 / 2835
    near = (near * y - 17 / 315) * y + 2 / 15
    near = (near * y - 1 / 3) * y + 1
    return tl.where(y < 0.1, x * near, far)


# ---- Dropout ------------------------------------------------------------------------------------


@triton.jit
def dropout_tile(problem, place, i, j0, KEYS: tl.constexpr, A: tl.constexpr):
    """Z [queries, keys]: 0 where dropped, 1/(1 - p) where kept. Word j % 4 of Philox4x32-10 on the
    counters (i, j // 4, batch·H + head, 0): the same in every pass, and in reference.py."""
    quad = (j0 // 4 + tl.arange(0, KEYS // 4))[None, :]
    query = i[:, None] + tl.zeros_like(quad)
    quad = quad + tl.zeros_like(query)
    head = (place.batch * problem.H + place.head).to(tl.int32) + tl.zeros_like(query)
    seed = tl.load(problem.seed)
    a, b, c, d = tl.philox(seed, query, quad, head, tl.zeros_like(query))
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    is_kept = words.to(tl.uint32, bitcast=True) >= tl.cast(problem.dropped_below, tl.uint32)
    return tl.where(is_kept, number(problem.kept, A), 0.0).to(A)
