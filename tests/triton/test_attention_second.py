"""Attention's second order in Triton, in the interpreter against the reference in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern
from genkern.backend import use_backend
from genkern.ops._triton import recording
from genkern.ops.attention import reference
from genkern.ops.attention.arguments import NOTHING_FIXED, Settings
from genkern.ops.attention.triton import configurations, launch

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2}
ROOM = 40  # more rows of NaN than a tile is high
RAN = {"attention", "attention.backward", "attention.second"}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """So that few rows are many tiles. "in turns": one result a launch, more than 16 features in
    pieces."""
    chosen = {"QUERIES": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1}
    in_turns = getattr(request, "param", "at once") == "in turns"
    others = {"PIECE": 16, "SPLIT": True} if in_turns else {}

    def choose(name, *_):
        return {**chosen, **others} if name.startswith("second") else chosen

    monkeypatch.setattr(configurations, "choose", choose)


in_turns = pytest.mark.parametrize("small_tiles", ["in turns"], indirect=True)
both_ways = pytest.mark.parametrize("small_tiles", ["at once", "in turns"], indirect=True)


def in_nan(x):
    """The same numbers in memory that goes on with NaN, in rows and in features."""
    *leading, rows, last = x.shape
    room = x.new_full((*leading, rows + ROOM, last + 5), float("nan"))
    room[..., :rows, :last] = x
    return room[..., :rows, :last]


def problem(shape, dtype, *bias_shapes):
    """Inputs, a cotangent of out, and directions, all amid NaN."""
    B, H, Hk, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv), *bias_shapes]
    inputs, tangents = ([in_nan(torch.randn(s, dtype=dtype)) for s in sizes] for _ in range(2))
    return inputs, in_nan(torch.randn(B, H, N, dv, dtype=dtype)), tangents


def results(call, inputs, cotangent, tangents):
    """The gradients of ⟨gradients, tangents⟩ for everything."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = call(*leaves)
    cotangents = [
        cotangent.detach().requires_grad_(),
        torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view_as(lse).requires_grad_(),
    ]
    # A row that sees nothing has lse = -inf.
    first = torch.autograd.grad(
        (out, lse.nan_to_num(0, 0, 0)), leaves, cotangents, create_graph=True
    )
    return torch.autograd.grad(first, [*leaves, *cotangents], tangents)


def assert_like_reference(inputs, cotangent, tangents, mask=None, **options):
    def call(q, k, v, bias=mask):
        torch.manual_seed(5)  # dropout's seed is drawn from torch's generator
        return genkern.attention(q, k, v, bias, enable_gqa=True, return_lse=True, **options)

    with use_backend("triton"), genkern.explain() as log:
        got = results(call, inputs, cotangent, tangents)
    assert {(choice.op, choice.backend) for choice in log} == {(op, "triton") for op in RAN}
    wide = [x.double() for x in inputs], cotangent.double(), [x.double() for x in tangents]
    with use_backend("reference"):
        exact = results(call, *wide)
    dtype = inputs[0].dtype
    names = [f"second {x}" for x in ("q", "k", "v", "bias")[: len(inputs)]] + ["dout", "dlse"]
    for name, g, e in zip(names, got, exact, strict=True):
        size = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(
            g.double(),
            e,
            rtol=0,
            atol=TOLERANCE[dtype] * size,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda x: str(x).removeprefix("torch."))
def test_shapes(dtype, poisoned):
    assert_like_reference(*problem((1, 2, 1, 17, 40, 24, 40), dtype))


@in_turns
def test_wide_rows(small_tiles, poisoned):
    assert_like_reference(*problem((1, 1, 1, 19, 35, 40, 3), torch.float64))
    assert_like_reference(*problem((1, 1, 1, 5, 7, 3, 40), torch.float64), softcap=2.0)


OPTIONS = {
    "causal": {"is_causal": True},
    "window, last at last": {"window": (12, 4), "alignment": "lower_right"},
    "negative scale": {"scale": -0.7},
    "zero scale": {"scale": 0.0},
    "distances": {"similarity": "l2", "scale": 0.3},
    "dropout, softcap, window": {"dropout_p": 0.2, "softcap": 1.5, "window": (30, 2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, poisoned):
    assert_like_reference(*problem((1, 2, 1, 20, 37, 12, 5), torch.float64), **options)


@pytest.mark.parametrize("shape", [(1, 1, 20, 37), (1, 2, 1, 37), (2, 1, 20, 1)], ids=str)
def test_biases(shape, poisoned):
    given = problem((shape[0], 2, 1, 20, 37, 5, 4), torch.float64, shape)
    assert_like_reference(*given, is_causal=True, softcap=2.0)


def test_boolean_masks_and_rows_without_keys(poisoned):
    mask = torch.rand(1, 1, 20, 37) > 0.5
    mask[:, :, 7] = False
    assert_like_reference(*problem((1, 2, 2, 20, 37, 8, 8), torch.float64), mask)


def test_padding_is_never_read(poisoned):
    inputs, cotangent, tangents = problem((3, 1, 1, 20, 40, 8, 8), torch.float64)
    lengths = torch.tensor([0, 40, 21])
    for x in (*inputs[1:], *tangents[1:]):
        for batch, length in enumerate(lengths):
            x[batch, :, length:] = float("nan")

    def call(q, k, v):
        return genkern.attention(q, k, v, key_lengths=lengths, return_lse=True)

    clean = [[x.nan_to_num(0) for x in xs] for xs in (inputs, tangents)]
    with use_backend("triton"):
        got = results(call, inputs, cotangent, tangents)
    with use_backend("reference"):
        expected = results(call, clean[0], cotangent, clean[1])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_large_bias_reaches_no_row_beyond_the_last(poisoned):
    """exp of it alone would be infinite there."""
    inputs, cotangent, tangents = problem((1, 1, 1, 3, 5, 4, 4), torch.float32, (1, 1, 1, 5))
    inputs[3] += 200
    assert_like_reference(inputs, cotangent, tangents)


def test_sequences_one_after_another(poisoned):
    q_starts, k_starts = torch.tensor([0, 0, 30, 41]), torch.tensor([0, 10, 55, 55])
    sizes = [(41, 2, 9), (55, 1, 9), (55, 1, 14)]
    inputs, tangents = ([torch.randn(s, dtype=torch.float64) for s in sizes] for _ in range(2))
    cotangent = torch.randn(41, 2, 14, dtype=torch.float64)

    def call(*qkv):
        torch.manual_seed(1)
        return genkern.attention_varlen(
            *qkv,
            q_starts,
            k_starts,
            enable_gqa=True,
            return_lse=True,
            dropout_p=0.3,
            is_causal=True,
        )

    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            found.append(results(call, inputs, cotangent, tangents))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def launched(given, wanted):
    """(results, those of the reference, names of the kernels) of a call with some of the tangents
    and cotangents, where both biases are given."""
    shape = (1, 2, 1, 20, 37, 5, 4)
    (q, k, v, bias), grad_out, tangents = problem(shape, torch.float64, (1, 2, 20, 37))
    inputs = q, k, v, bias, torch.randn(1, 1, 37, dtype=torch.float64)
    tangents.append(torch.randn(1, 1, 37, dtype=torch.float64))
    tangents = [x if i in given else None for i, x in enumerate(tangents)]
    cotangents = grad_out, torch.randn(1, 2, 20, dtype=torch.float64)
    cotangents = [x if i in given else None for i, x in enumerate(cotangents, 5)]
    numbers = Settings(0.4, 1.5)
    rows = reference.softmax_rows(inputs, NOTHING_FIXED, numbers)
    call = inputs, NOTHING_FIXED, numbers, rows, *cotangents, tangents, wanted
    got = launch.second(*call)
    with recording("sm_90") as launches:
        launch.second(*call)
    # Missing cotangents have gradients too.
    whole = [
        torch.zeros_like(like) if x is None else x
        for x, like in zip(cotangents, (grad_out, rows[0]), strict=True)
    ]
    expected = reference.second(inputs, NOTHING_FIXED, numbers, *whole, tangents)
    return got, expected, [x.kernel.__name__.removeprefix("attention_second_") for x in launches]


@pytest.mark.parametrize("given", [(0, 5, 6), (1, 5), (2, 5, 6), (0, 2, 4, 5)], ids=str)
def test_missing_tangents_and_cotangents_are_zero(given, poisoned):
    got, expected, _ = launched(given, (True,) * 7)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [
        ((0,), ["stats", "rows"]),
        ((2,), ["stats", "columns"]),
        ((3,), ["stats", "bias"]),
        ((4,), ["stats", "columns"]),
        ((6,), ["stats"]),
        ((1, 3, 5), ["stats", "rows", "columns", "bias"]),
    ],
    ids=str,
)
def test_what_is_not_wanted_costs_nothing(wanted, kernels, poisoned):
    got, expected, ran = launched(range(7), tuple(i in wanted for i in range(7)))
    assert ran == kernels
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert (ours is not None) == (i in wanted)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@in_turns
def test_a_launch_for_each_result(small_tiles, poisoned):
    got, expected, ran = launched(range(7), (True,) * 7)
    assert ran == ["stats", "rows", "rows", "columns", "columns", "bias"]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_means_cost_no_digits(dtype, poisoned):
    """Neither of T (logits that all grow alike leave the softmax as it is) nor of dP (nor of U)."""
    inputs, cotangent, tangents = problem((1, 1, 1, 20, 100, 8, 8), dtype, (1, 1, 20, 100))
    tangents[3] += 500.0
    inputs[2][..., 0] += 100.0
    tangents[2][..., 0] += 100.0
    assert_like_reference(inputs, cotangent, tangents)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)], ids=str)
def test_empty(sizes, poisoned):
    assert_like_reference(*problem((2, 2, 1, *sizes), torch.float64), is_causal=True)


def test_any_strides(poisoned):
    sizes = [(1, 30, 2, 8), (1, 30, 2, 8), (1, 2, 10, 30)]
    found = []
    for _ in range(2):
        q, k, v = (torch.randn(s, dtype=torch.float64) for s in sizes)
        found.append([q.transpose(1, 2), k.transpose(1, 2), v.transpose(2, 3)])
    found[1][2] = torch.randn(1, 1, 30, 10, dtype=torch.float64).expand(1, 2, 30, 10)
    cotangent = torch.randn(1, 1, 30, 10, dtype=torch.float64).expand(1, 2, 30, 10)
    assert_like_reference(found[0], cotangent, found[1])


def test_deterministic():
    given = problem((1, 1, 1, 20, 20, 5, 4), torch.float32, (1, 1, 20, 20))
    with use_backend("triton"):
        found = [
            results(lambda *x: genkern.attention(*x, enable_gqa=True, return_lse=True), *given)
            for _ in range(2)
        ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_gradgradcheck():
    inputs = [torch.randn(1, 1, n, 2, dtype=torch.float64).requires_grad_() for n in (2, 3, 3)]

    def call(*qkv):
        return genkern.attention(*qkv, softcap=2.0, is_causal=True, alignment="lower_right")

    with use_backend("triton"), genkern.explain() as log:
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)
    assert {choice.backend for choice in log} == {"triton"}
    assert {choice.op for choice in log} >= RAN


features = st.integers(1, 40)


@pytest.mark.exhaustive
@both_ways
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    N=st.integers(0, 50),
    M=st.integers(0, 70),
    widths=st.tuples(features, features),
    is_causal=st.booleans(),
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    window=st.none() | st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 50)),
    softcap=st.none() | st.floats(0.5, 5),
    bias=st.none() | st.tuples(*[st.booleans()] * 4),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_any_arguments(small_tiles, heads, N, M, widths, bias, seed, **options):
    torch.manual_seed(seed)
    shapes = []
    if bias is not None:
        shapes = [[n if own else 1 for n, own in zip((1, heads[0], N, M), bias, strict=True)]]
    assert_like_reference(*problem((1, *heads, N, M, *widths), torch.float64, *shapes), **options)
