"""Attention's forward mode in Triton, in the interpreter against the reference in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern
from genkern.backend import use_backend
from genkern.ops.attention import reference
from genkern.ops.attention.arguments import NOTHING_FIXED, Settings
from genkern.ops.attention.choice import WIDEST_FP64
from genkern.ops.attention.triton import configurations, launch

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 6e-3}
ROOM = 40  # more rows of NaN than a tile is high


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few rows are many tiles; heads of more than 32 features go in pieces."""
    chosen = {"QUERIES": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1}

    def choose(name, *_):
        return {**chosen, "PIECE": 32} if name == "jvp" else chosen

    monkeypatch.setattr(configurations, "choose", choose)


def in_nan(x):
    """The same numbers in memory that goes on with NaN, in rows and in features."""
    *leading, rows, last = x.shape
    room = x.new_full((*leading, rows + ROOM, last + 5), float("nan"))
    room[..., :rows, :last] = x
    return room[..., :rows, :last]


def directions(shape, dtype, bias_shape=None, mean=0.0):
    """Inputs q, k, v and perhaps a bias, and their tangents, all amid NaN."""
    B, H, Hk, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv)]
    sizes += [] if bias_shape is None else [bias_shape]
    inputs = [in_nan(torch.randn(s, dtype=dtype)) for s in sizes]
    tangents = [in_nan(torch.randn(s, dtype=dtype) + mean * (i == 3)) for i, s in enumerate(sizes)]
    return inputs, tangents


def derivatives(call, inputs, tangents):
    return torch.func.jvp(call, tuple(inputs), tuple(tangents))[1]


def assert_like_reference(inputs, tangents, mask=None, tolerance=None, **options):
    def call(q, k, v, bias=mask):
        torch.manual_seed(5)  # dropout's seed is drawn from torch's generator
        return genkern.attention(q, k, v, bias, enable_gqa=True, return_lse=True, **options)

    with use_backend("triton"), genkern.explain() as log:
        got = derivatives(call, inputs, tangents)
    assert {choice.backend for choice in log} == {"triton"}
    assert "attention.jvp" in {choice.op for choice in log}
    with use_backend("reference"):
        exact = derivatives(call, *([x.double() for x in xs] for xs in (inputs, tangents)))
    dtype = inputs[0].dtype
    assert got[0].dtype == dtype
    for name, g, e in zip(("out", "lse"), got, exact, strict=True):
        size = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(
            g.double(),
            e,
            rtol=0,
            atol=(tolerance or TOLERANCE[dtype]) * size,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda x: str(x).removeprefix("torch."))
def test_shapes(dtype, poisoned):
    for shape in [(1, 2, 1, 21, 40, 24, 40), (1, 1, 1, 5, 9, 70, 3)]:
        if dtype == torch.float64 and torch.cuda.is_available() and max(shape[-2:]) > WIDEST_FP64:
            continue  # only the interpreter has registers for them
        assert_like_reference(*directions(shape, dtype))


OPTIONS = {
    "causal": {"is_causal": True},
    "window, last at last": {"window": (12, 4), "alignment": "lower_right"},
    "softcap": {"softcap": 1.5},
    "negative scale": {"scale": -0.7},
    "zero scale": {"scale": 0.0},
    "distances": {"similarity": "l2", "scale": 0.3},
    "dropout": {"dropout_p": 0.3},
    "everything dropped": {"dropout_p": 1.0},
    "dropout, softcap, window": {"dropout_p": 0.2, "softcap": 3.0, "window": (30, 2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, poisoned):
    assert_like_reference(*directions((1, 2, 1, 20, 37, 12, 5), torch.float64), **options)


@pytest.mark.parametrize("shape", [(1, 2, 20, 40), (1, 2, 1, 40), (2, 1, 20, 1)], ids=str)
def test_biases(shape, poisoned):
    given = directions((shape[0], 2, 1, 20, 40, 5, 4), torch.float64, shape)
    assert_like_reference(*given, is_causal=True, softcap=2.0)


def test_boolean_masks_and_rows_without_keys(poisoned):
    mask = torch.rand(2, 1, 20, 37) > 0.5
    mask[:, :, 7] = False
    assert_like_reference(*directions((2, 2, 2, 20, 37, 8, 8), torch.float64), mask)


def test_padding_is_never_read(poisoned):
    inputs, tangents = directions((3, 1, 1, 20, 40, 8, 8), torch.float64)
    lengths = torch.tensor([0, 40, 21])
    for x in (*inputs[1:], *tangents[1:]):
        for batch, length in enumerate(lengths):
            x[batch, :, length:] = float("nan")

    def call(q, k, v):
        return genkern.attention(q, k, v, key_lengths=lengths, return_lse=True)

    clean = [[x.nan_to_num(0) for x in xs] for xs in (inputs, tangents)]
    with use_backend("triton"):
        got = derivatives(call, inputs, tangents)
    with use_backend("reference"):
        expected = derivatives(call, *clean)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_sequences_one_after_another(poisoned):
    q_starts, k_starts = torch.tensor([0, 0, 30, 41]), torch.tensor([0, 10, 55, 55])
    sizes = [(41, 2, 9), (55, 1, 9), (55, 1, 14)]
    inputs, tangents = ([torch.randn(s, dtype=torch.float64) for s in sizes] for _ in range(2))

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
            found += [derivatives(call, inputs, tangents)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (3,), (0, 4), (1, 2)], ids=str)
def test_missing_tangents_are_zero(given, poisoned):
    (q, k, v, bias), tangents = directions((1, 2, 1, 20, 40, 5, 4), torch.float64, (1, 2, 20, 40))
    inputs = q, k, v, bias, torch.randn(1, 1, 40, dtype=torch.float64)
    tangents.append(torch.randn(1, 1, 40, dtype=torch.float64))
    tangents = [x if i in given else None for i, x in enumerate(tangents)]
    numbers = Settings(0.4, 1.5)
    rows = reference.softmax_rows(inputs, NOTHING_FIXED, numbers)
    got = launch.jvp(inputs, NOTHING_FIXED, numbers, rows, tangents)
    expected = reference.jvp(inputs, NOTHING_FIXED, numbers, tangents)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_mean_of_the_tangents_costs_no_digits(poisoned):
    """Logits that all grow by the same leave the softmax as it is."""
    shape, bias_shape = (1, 2, 2, 20, 100, 8, 8), (1, 1, 20, 100)
    inputs, tangents = directions(shape, torch.float16, bias_shape, mean=500.0)
    assert_like_reference(inputs, tangents, tolerance=2e-3)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)], ids=str)
def test_empty(sizes, poisoned):
    assert_like_reference(*directions((2, 2, 1, *sizes), torch.float64), is_causal=True)


def test_any_strides(poisoned):
    sizes = [(1, 30, 2, 8), (1, 30, 2, 8), (1, 2, 10, 30)]
    found = []
    for _ in range(2):
        q, k, v = (torch.randn(s, dtype=torch.float64) for s in sizes)
        found.append([q.transpose(1, 2), k.transpose(1, 2), v.transpose(2, 3)])
    found[1][2] = torch.randn(1, 1, 30, 10, dtype=torch.float64).expand(1, 2, 30, 10)
    assert_like_reference(*found)


def test_forward_mode_gradcheck():
    inputs = [torch.randn(1, 1, n, 2, dtype=torch.float64) for n in (2, 3, 3)]

    def call(*qkv):
        return genkern.attention(*qkv, softcap=2.0, is_causal=True, alignment="lower_right")

    with use_backend("triton"):
        inputs = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)


sizes = st.integers(1, 40)


@pytest.mark.exhaustive
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    N=st.integers(0, 50),
    M=st.integers(0, 70),
    features=st.tuples(sizes, sizes),
    is_causal=st.booleans(),
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    window=st.none() | st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 50)),
    softcap=st.none() | st.floats(0.5, 5),
    bias=st.none() | st.tuples(*[st.booleans()] * 4),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_any_arguments(small_tiles, heads, N, M, features, bias, seed, **options):
    torch.manual_seed(seed)
    if bias is not None:
        bias = [n if own else 1 for n, own in zip((1, heads[0], N, M), bias, strict=True)]
    given = directions((1, *heads, N, M, *features), torch.float64, bias)
    assert_like_reference(*given, **options)
