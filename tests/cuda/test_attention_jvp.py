"""CUDA attention's forward mode against the reference in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern
from genkern.backend import use_backend
from genkern.ops.attention import cuda, reference
from genkern.ops.attention.arguments import NOTHING_FIXED, Settings

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
ROOM = 70  # more rows of NaN than a block is high


def in_nan(x, beside=5):
    """The same numbers in memory that goes on with NaN, in rows and in features. Rows of 8 and more
    features beside are copied in vectors where they begin at multiples of 16 bytes."""
    *leading, rows, last = x.shape
    room = x.new_full((*leading, rows + ROOM, last + beside), float("nan"))
    room[..., :rows, :last] = x
    return room[..., :rows, :last]


def directions(shape, dtype, device, bias_shape=None, mean=0.0, beside=5):
    """Inputs q, k, v and perhaps a bias, and their tangents, all amid NaN."""
    B, H, Hk, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv)]
    sizes += [] if bias_shape is None else [bias_shape]

    def drawn(size, mean=0.0):
        return in_nan(torch.randn(size, dtype=dtype, device=device) + mean, beside)

    inputs = [drawn(size) for size in sizes]
    tangents = [drawn(size, mean * (i == 3)) for i, size in enumerate(sizes)]
    return inputs, tangents


def derivatives(call, inputs, tangents):
    return torch.func.jvp(call, tuple(inputs), tuple(tangents))[1]


def assert_like_reference(inputs, tangents, log, mask=None, tolerance=None, **options):
    def call(q, k, v, bias=mask):
        torch.manual_seed(5)  # dropout's seed is drawn from torch's generator
        return genkern.attention(q, k, v, bias, enable_gqa=True, return_lse=True, **options)

    got = derivatives(call, inputs, tangents)
    assert {(choice.op, choice.backend) for choice in log} == {
        ("attention", "cuda"),
        ("attention.jvp", "cuda"),
    }
    with use_backend("reference"):
        exact = derivatives(call, *([x.double() for x in xs] for xs in (inputs, tangents)))
    assert got[0].dtype == inputs[0].dtype
    assert_close(got, exact, tolerance or TOLERANCE[inputs[0].dtype])


def assert_close(got, exact, tolerance):
    for name, ours, theirs in zip(("out", "lse"), got, exact, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.double(),
            theirs.double(),
            rtol=0,
            atol=tolerance * size,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda x: str(x).removeprefix("torch."))
def test_shapes(dtype, device, on_cuda, poisoned):
    assert_like_reference(*directions((1, 2, 1, 69, 40, 24, 40), dtype, device), on_cuda)


PLAIN_WIDE = {((24, 96), torch.float16), ((128, 72), torch.float32)}
# Every size and dtype is a kernel of its own, and takes seconds to translate.
WIDE = [
    pytest.param(
        widths,
        dtype,
        id=f"{widths}-{str(dtype).removeprefix('torch.')}",
        marks=() if (widths, dtype) in PLAIN_WIDE else pytest.mark.exhaustive,
    )
    for widths in ((24, 96), (128, 72), (65, 3))
    for dtype in TOLERANCE
]


@pytest.mark.parametrize(("widths", "dtype"), WIDE)
def test_wide_rows(dtype, widths, device, on_cuda, poisoned):
    given = directions((1, 1, 1, 19, 37, *widths), dtype, device, beside=8)
    assert_like_reference(*given, on_cuda)


OPTIONS = {
    "causal": {"is_causal": True},
    "window, last at last": {"window": (12, 4), "alignment": "lower_right"},
    "negative scale": {"scale": -0.7},
    "zero scale": {"scale": 0.0},
    "distances": {"similarity": "l2", "scale": 0.3},
    "dropout": {"dropout_p": 0.3},
    "everything dropped": {"dropout_p": 1.0},
    "dropout, softcap, window": {"dropout_p": 0.2, "softcap": 3.0, "window": (30, 2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, device, on_cuda, poisoned):
    given = directions((1, 2, 1, 20, 37, 12, 5), torch.float32, device)
    assert_like_reference(*given, on_cuda, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["reversed", 1], ids=str)
def test_any_schedule(schedule, dtype, device, on_cuda, poisoned):
    given = directions((1, 1, 1, 20, 37, 16, 8), dtype, device, beside=8)
    assert_like_reference(*given, on_cuda, dropout_p=0.2, softcap=3.0)


@pytest.mark.parametrize("shape", [(1, 2, 20, 40), (1, 2, 1, 40), (2, 1, 20, 1)], ids=str)
def test_biases(shape, device, on_cuda, poisoned):
    given = directions((shape[0], 2, 1, 20, 40, 5, 4), torch.float32, device, shape)
    assert_like_reference(*given, on_cuda, is_causal=True, softcap=2.0)


def test_boolean_masks_and_rows_without_keys(device, on_cuda, poisoned):
    mask = torch.rand(2, 1, 20, 37, device=device) > 0.5
    mask[:, :, 7] = False
    given = directions((2, 2, 2, 20, 37, 8, 8), torch.float32, device)
    assert_like_reference(*given, on_cuda, mask)


def test_padding_is_never_read(device, on_cuda, poisoned):
    inputs, tangents = directions((3, 1, 1, 20, 40, 8, 8), torch.float32, device)
    lengths = torch.tensor([0, 40, 21], device=device)
    for x in (*inputs[1:], *tangents[1:]):
        for batch, length in enumerate(lengths):
            x[batch, :, length:] = float("nan")

    def call(q, k, v):
        return genkern.attention(q, k, v, key_lengths=lengths, return_lse=True)

    got = derivatives(call, inputs, tangents)
    with use_backend("reference"):
        clean = ([x.nan_to_num(0).double() for x in xs] for xs in (inputs, tangents))
        expected = derivatives(call, *clean)
    assert_close(got, expected, TOLERANCE[torch.float32])


def test_sequences_one_after_another(device, on_cuda, poisoned):
    q_starts = torch.tensor([0, 0, 30, 41], device=device)
    k_starts = torch.tensor([0, 10, 55, 55], device=device)
    sizes = [(41, 2, 9), (55, 1, 9), (55, 1, 14)]
    inputs, tangents = ([torch.randn(s, device=device) for s in sizes] for _ in range(2))

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

    got = derivatives(call, inputs, tangents)
    assert {choice.backend for choice in on_cuda} == {"cuda"}
    with use_backend("reference"):
        expected = derivatives(call, *([x.double() for x in xs] for xs in (inputs, tangents)))
    assert_close(got, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (3,), (0, 4), (1, 2)], ids=str)
def test_missing_tangents_are_zero(given, device, on_cuda, poisoned):
    (q, k, v, bias), tangents = directions(
        (1, 2, 1, 20, 40, 5, 4), torch.float32, device, (1, 2, 20, 40)
    )
    inputs = q, k, v, bias, torch.randn(1, 1, 40, device=device)
    tangents.append(torch.randn(1, 1, 40, device=device))
    tangents = [x if i in given else None for i, x in enumerate(tangents)]
    numbers = Settings(0.4, 1.5)
    rows = reference.softmax_rows(inputs, NOTHING_FIXED, numbers)
    got = cuda.jvp(inputs, NOTHING_FIXED, numbers, rows, tangents)
    inputs, tangents = (
        [None if x is None else x.double() for x in xs] for xs in (inputs, tangents)
    )
    assert_close(got, reference.jvp(inputs, NOTHING_FIXED, numbers, tangents), 2e-5)


def test_a_mean_of_the_tangents_costs_no_digits(device, on_cuda, poisoned):
    """Logits that all grow by the same leave the softmax as it is."""
    shape, bias_shape = (1, 2, 2, 20, 100, 8, 8), (1, 1, 20, 100)
    inputs, tangents = directions(shape, torch.float16, device, bias_shape, mean=500.0)
    assert_like_reference(inputs, tangents, on_cuda, tolerance=2e-3)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)], ids=str)
def test_empty(sizes, device, on_cuda, poisoned):
    given = directions((2, 2, 1, *sizes), torch.float32, device)
    assert_like_reference(*given, on_cuda, is_causal=True)


def test_any_strides(device, on_cuda, poisoned):
    sizes = [(1, 30, 2, 8), (1, 30, 2, 8), (1, 2, 10, 30)]
    found = []
    for _ in range(2):
        q, k, v = (torch.randn(s, device=device) for s in sizes)
        found.append([q.transpose(1, 2), k.transpose(1, 2), v.transpose(2, 3)])
    found[1][2] = torch.randn(1, 1, 30, 10, device=device).expand(1, 2, 30, 10)
    assert_like_reference(*found, on_cuda)


@pytest.mark.exhaustive
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    N=st.integers(0, 80),
    M=st.integers(0, 70),
    features=st.tuples(st.integers(1, 128), st.integers(1, 128)),
    beside=st.sampled_from([5, 8]),
    is_causal=st.booleans(),
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    window=st.none() | st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 50)),
    softcap=st.none() | st.floats(0.5, 5),
    bias=st.none() | st.tuples(*[st.booleans()] * 4),
    dropout_p=st.sampled_from([0.0, 0.4]),
    schedule=st.sampled_from(["sequential", "reversed"]) | st.integers(0, 100),
    seed=st.integers(0, 2**31),
)
def test_any_arguments(
    running_cuda, device, dtype, heads, N, M, features, beside, bias, schedule, seed, **options
):
    torch.manual_seed(seed)
    if bias is not None:
        bias = [n if own else 1 for n, own in zip((1, heads[0], N, M), bias, strict=True)]
    given = directions((1, *heads, N, M, *features), dtype, device, bias, beside=beside)
    with running_cuda(schedule) as log:
        assert_like_reference(*given, log, **options)
