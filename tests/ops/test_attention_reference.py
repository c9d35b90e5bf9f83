"""What attention means: the reference against formulas written out, and published numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern.ops.attention import reference
from genkern.ops.attention.arguments import NOTHING_FIXED, UNBOUNDED, Fixed, Settings


@pytest.fixture(autouse=True)
def on_the_reference():
    with genkern.use_backend("reference"):
        yield


def by_hand(q, k, v, i, allowed, scale, softcap=0.0, bias=None, distance=False):
    """Row i of one head over a list of keys: the output and the logsumexp."""
    if not allowed:
        return v.new_zeros(v.shape[1]), torch.tensor(-torch.inf, dtype=v.dtype)
    logits = []
    for j in allowed:
        x = -scale * (q[i] - k[j]).square().sum() if distance else scale * (q[i] @ k[j])
        x = softcap * torch.tanh(x / softcap) if softcap else x
        logits.append(x if bias is None else x + bias[i, j])
    logits = torch.stack(logits)
    total = logits.exp().sum()
    return (logits.exp()[:, None] * v[allowed]).sum(0) / total, total.log()


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    is_causal=st.booleans(),
    lower_right=st.booleans(),
    window=st.none() | st.tuples(*[st.none() | st.integers(0, 4)] * 2),
    length=st.none() | st.integers(0, 6),
    softcap=st.none() | st.just(0.8),
    biased=st.booleans(),
    distance=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_row_by_row(sizes, is_causal, lower_right, window, length, softcap, biased, distance, seed):
    torch.manual_seed(seed)
    N, M = sizes
    q, k, v = (torch.randn(n, d, dtype=torch.float64) for n, d in ((N, 3), (M, 3), (M, 2)))
    bias = torch.randn(N, M, dtype=torch.float64) if biased else None
    length = None if length is None else min(length, M)
    softcap = None if distance else softcap
    out, lse = genkern.attention(
        q,
        k,
        v,
        bias,
        is_causal=is_causal,
        alignment="lower_right" if lower_right else "upper_left",
        window=window,
        key_lengths=None if length is None else torch.tensor(length),
        softcap=softcap,
        scale=0.4,
        similarity="l2" if distance else "dot",
        return_lse=True,
    )
    left, right = (UNBOUNDED if x is None else x for x in window or (None, None))
    offset = M - N if lower_right else 0
    for i in range(N):
        place = i + offset
        allowed = [
            j
            for j in range(M if length is None else length)
            if place - left <= j <= place + right and (not is_causal or j <= place)
        ]
        row, total = by_hand(q, k, v, i, allowed, 0.4, softcap or 0.0, bias, distance)
        torch.testing.assert_close(out[i], row)
        torch.testing.assert_close(lse[i], total)


def test_rows_with_nothing_to_see_have_no_derivative():
    """Zeros, and zeros again: no NaN however often it is differentiated."""
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    out, lse = genkern.attention(q, k, v, mask, return_lse=True)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
    loss = out.square().sum() + lse[:, :, [0, 2, 3]].sum()
    for _ in range(3):
        grads = torch.autograd.grad(loss, (q, k, v), create_graph=True)
        assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 1] == 0).all()
        loss = sum(g.square().sum() for g in grads)
    (of_lse,) = torch.autograd.grad(genkern.attention(q, k, v, mask, return_lse=True)[1].sum(), q)
    assert (of_lse[:, :, 1] == 0).all() and of_lse.isfinite().all()


def test_gradcheck_twice():
    q, k, v = (
        torch.randn(1, h, n, 2, dtype=torch.float64, requires_grad=True)
        for h, n in ((2, 2), (1, 3), (1, 3))
    )
    bias = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)

    def call(*x):
        torch.manual_seed(0)
        return genkern.attention(*x, dropout_p=0.3, enable_gqa=True, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v, bias))


def test_the_primitives_are_derivatives():
    """Against difference quotients of the reference itself, along one direction."""
    inputs = [torch.randn(1, 2, n, 3, dtype=torch.float64) for n in (4, 5, 5)]
    inputs += [
        torch.randn(1, 1, 4, 5, dtype=torch.float64),
        torch.randn(1, 2, 5, dtype=torch.float64),
    ]
    numbers = Settings(0.6, softcap=1.5, right=1)
    along = [torch.randn_like(x) for x in inputs]
    cotangents = [torch.randn(1, 2, 4, 3).double(), torch.randn(1, 2, 4).double()]

    def dot(xs, ys):
        return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))

    def quotient(function, step=1e-6):
        ends = [
            function([x + s * t for x, t in zip(inputs, along, strict=True)]) for s in (step, -step)
        ]
        return [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]

    def values(x):
        return reference.attention(x, NOTHING_FIXED, numbers)

    def gradients(x):
        return reference.backward(x, NOTHING_FIXED, numbers, *cotangents)

    tangents = quotient(values)
    for got, expected in zip(
        reference.jvp(inputs, NOTHING_FIXED, numbers, along), tangents, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        dot(gradients(inputs), along), dot(cotangents, tangents), rtol=1e-7, atol=1e-7
    )
    # The Hessian is symmetric: the derivative of the gradients along `along` is what `second` pulls
    # back, and what it gives for the cotangents is the tangent of the outputs.
    found = reference.second(inputs, NOTHING_FIXED, numbers, *cotangents, along)
    for got, expected in zip(found, [*quotient(gradients), *tangents], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# ---- Dropout's bits -----------------------------------------------------------------------------


# The known answers of Random123's own tests (kat_vectors): counter, key, words.
KNOWN = [
    ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, seed, words):
    found = reference._philox([torch.tensor(x) for x in counter], seed)
    assert [f"{x.item():08x}" for x in found] == words.split()


def test_each_place_has_its_word():
    mask = reference.dropout_mask(torch.zeros(2, 3, 4, 10, dtype=torch.float64), 77, 0.5, batch=5)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 9), (0, 1, 2, 6)):
        counter = [torch.tensor(x) for x in (i, j // 4, (5 + b) * 3 + h, 0)]
        kept = reference._philox(counter, 77)[j % 4] >= 2**31
        assert mask[b, h, i, j] == (2.0 if kept else 0.0)


def test_sequences_have_masks_of_their_own():
    q = torch.zeros(1, 1, 6, 1)
    v = torch.eye(6)[None, None]
    starts = torch.tensor([0, 3, 6])
    fixed = Fixed(q_starts=starts, k_starts=starts, seed=torch.tensor(5))
    numbers = Settings(1.0, dropout_p=0.5)
    out, _ = reference.attention((q, q, v, None, None), fixed, numbers)
    for s, block in enumerate((out[0, 0, :3, :3], out[0, 0, 3:, 3:])):
        mask = reference.dropout_mask(torch.zeros(1, 1, 3, 3), 5, 0.5, batch=s)[0, 0]
        torch.testing.assert_close(block, mask / 3)
