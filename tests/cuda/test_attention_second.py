"""CUDA attention's second order against the reference in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern
from genkern.backend import use_backend
from genkern.ops.attention import cuda, reference
from genkern.ops.attention.arguments import NOTHING_FIXED, Settings

TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
ROOM = 70  # more rows of NaN than a block is high
RAN = {"attention", "attention.backward", "attention.second"}
NAMES = ("q", "k", "v", "bias", "key bias", "grad_out", "grad_lse")


def in_nan(x, beside=5):
    """The same numbers in memory that goes on with NaN, in rows and in features. Rows of 8 and more
    features beside are copied in vectors where they begin at multiples of 16 bytes."""
    *leading, rows, last = x.shape
    room = x.new_full((*leading, rows + ROOM, last + beside), float("nan"))
    room[..., :rows, :last] = x
    return room[..., :rows, :last]


def problem(shape, dtype, device, *bias_shapes, beside=5):
    """Inputs, a cotangent of out, and directions, all amid NaN."""
    B, H, Hk, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv), *bias_shapes]

    def drawn(size):
        return in_nan(torch.randn(size, dtype=dtype, device=device), beside)

    return [drawn(s) for s in sizes], drawn((B, H, N, dv)), [drawn(s) for s in sizes]


def results(call, inputs, cotangent, tangents):
    """The gradients of ⟨gradients, tangents⟩ for everything."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = call(*leaves)
    of_lse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype, device=lse.device).view_as(lse)
    cotangents = [cotangent.detach().requires_grad_(), of_lse.requires_grad_()]
    # A row that sees nothing has lse = -inf.
    first = torch.autograd.grad(
        (out, lse.nan_to_num(0, 0, 0)), leaves, cotangents, create_graph=True
    )
    return torch.autograd.grad(first, [*leaves, *cotangents], tangents)


def in_doubles(tensors):
    return [None if x is None else x.double() for x in tensors]


def assert_like_reference(inputs, cotangent, tangents, log, mask=None, **options):
    def call(q, k, v, bias=mask):
        torch.manual_seed(5)  # dropout's seed is drawn from torch's generator
        return genkern.attention(q, k, v, bias, enable_gqa=True, return_lse=True, **options)

    got = results(call, inputs, cotangent, tangents)
    assert {(choice.op, choice.backend) for choice in log} == {(op, "cuda") for op in RAN}
    with use_backend("reference"):
        exact = results(call, in_doubles(inputs), cotangent.double(), in_doubles(tangents))
    names = [*NAMES[: len(inputs)], *NAMES[5:]]
    assert_close(names, got, exact, TOLERANCE[inputs[0].dtype])


def assert_close(names, got, exact, tolerance):
    for name, ours, theirs in zip(names, got, exact, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.double(),
            theirs.double(),
            rtol=0,
            atol=tolerance * size,
            msg=lambda m: f"second {name}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda x: str(x).removeprefix("torch."))
def test_shapes(dtype, device, on_cuda, poisoned):
    assert_like_reference(*problem((1, 2, 1, 69, 40, 24, 40), dtype, device), on_cuda)


OPTIONS = {
    "causal": {"is_causal": True},
    "window, last at last": {"window": (12, 4), "alignment": "lower_right"},
    "negative scale": {"scale": -0.7},
    "distances": {"similarity": "l2", "scale": 0.3},
    "dropout, softcap, window": {"dropout_p": 0.2, "softcap": 1.5, "window": (30, 2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, device, on_cuda, poisoned):
    given = problem((1, 2, 1, 20, 37, 12, 5), torch.float32, device)
    assert_like_reference(*given, on_cuda, **options)


@pytest.mark.parametrize("shape", [(1, 1, 20, 37), (1, 2, 1, 37), (2, 1, 20, 1)], ids=str)
def test_biases(shape, device, on_cuda, poisoned):
    given = problem((shape[0], 2, 1, 20, 37, 5, 4), torch.float32, device, shape)
    assert_like_reference(*given, on_cuda, is_causal=True, softcap=2.0)


def test_boolean_masks_and_rows_without_keys(device, on_cuda, poisoned):
    mask = torch.rand(1, 1, 20, 37, device=device) > 0.5
    mask[:, :, 7] = False
    given = problem((1, 2, 2, 20, 37, 8, 8), torch.float32, device)
    assert_like_reference(*given, on_cuda, mask)


def test_padding_is_never_read(device, on_cuda, poisoned):
    inputs, cotangent, tangents = problem((3, 1, 1, 20, 40, 8, 8), torch.float32, device)
    lengths = torch.tensor([0, 40, 21], device=device)
    for x in (*inputs[1:], *tangents[1:]):
        for batch, length in enumerate(lengths):
            x[batch, :, length:] = float("nan")

    def call(q, k, v):
        return genkern.attention(q, k, v, key_lengths=lengths, return_lse=True)

    got = results(call, inputs, cotangent, tangents)
    clean = [[x.nan_to_num(0).double() for x in xs] for xs in (inputs, tangents)]
    with use_backend("reference"):
        expected = results(call, clean[0], cotangent.double(), clean[1])
    assert_close([*NAMES[:3], *NAMES[5:]], got, expected, TOLERANCE[torch.float32])


def test_a_large_bias_reaches_no_row_beyond_the_last(device, on_cuda, poisoned):
    """exp of it alone would be infinite there."""
    given = problem((1, 1, 1, 3, 5, 4, 4), torch.float32, device, (1, 1, 1, 5))
    given[0][3] += 200
    assert_like_reference(*given, on_cuda)


def test_sequences_one_after_another(device, on_cuda, poisoned):
    q_starts = torch.tensor([0, 0, 30, 41], device=device)
    k_starts = torch.tensor([0, 10, 55, 55], device=device)
    sizes = [(41, 2, 9), (55, 1, 9), (55, 1, 14)]
    inputs, tangents = ([torch.randn(s, device=device) for s in sizes] for _ in range(2))
    cotangent = torch.randn(41, 2, 14, device=device)

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

    got = results(call, inputs, cotangent, tangents)
    assert {(choice.op, choice.backend) for choice in on_cuda} == {(op, "cuda") for op in RAN}
    with use_backend("reference"):
        exact = results(call, in_doubles(inputs), cotangent.double(), in_doubles(tangents))
    assert_close([*NAMES[:3], *NAMES[5:]], got, exact, TOLERANCE[torch.float32])


def direct(device, given=range(7), wanted=(True,) * 7, dtype=torch.float32, widths=(5, 4), **more):
    """(results, those of the reference) of the launches alone, with some of the tangents and
    cotangents, where both biases are given."""
    shape = (1, 2, 1, 20, 37, *widths)
    (q, k, v, bias), grad_out, tangents = problem(shape, dtype, device, (1, 2, 20, 37), **more)
    inputs = q, k, v, bias, torch.randn(1, 1, 37, device=device)
    tangents.append(torch.randn(1, 1, 37, device=device))
    tangents = [x if i in given else None for i, x in enumerate(tangents)]
    cotangents = grad_out, torch.randn(1, 2, 20, device=device)
    cotangents = [x if i in given else None for i, x in enumerate(cotangents, 5)]
    numbers = Settings(0.4, 1.5)
    rows = reference.softmax_rows(inputs, NOTHING_FIXED, numbers)
    got = cuda.second(inputs, NOTHING_FIXED, numbers, rows, *cotangents, tangents, wanted)
    # Missing cotangents have gradients too.
    whole = [
        torch.zeros_like(like) if x is None else x
        for x, like in zip(cotangents, (grad_out, rows[0]), strict=True)
    ]
    expected = reference.second(
        in_doubles(inputs), NOTHING_FIXED, numbers, *in_doubles(whole), in_doubles(tangents)
    )
    return got, expected


PLAIN_WIDE = {((24, 96), torch.float32), ((128, 72), torch.bfloat16)}
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
    got, expected = direct(device, dtype=dtype, widths=widths, beside=8)
    assert_close(NAMES, got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("given", [(0, 5, 6), (1, 5), (2, 5, 6), (0, 2, 4, 5)], ids=str)
def test_missing_tangents_and_cotangents_are_zero(given, device, on_cuda, poisoned):
    got, expected = direct(device, given)
    assert_close(NAMES, got, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("schedule", ["reversed", 1], ids=str)
def test_any_schedule(schedule, device, on_cuda, poisoned):
    for dtype in (torch.float32, torch.bfloat16):
        got, expected = direct(device, dtype=dtype, widths=(16, 8), beside=8)
        assert_close(NAMES, got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("wanted", "widths", "kernels"),
    [
        ((0,), (5, 4), ["rows"]),
        ((2,), (5, 4), ["rows", "columns"]),
        ((3,), (5, 4), ["rows", "bias"]),
        ((4,), (5, 4), ["rows", "columns"]),
        ((6,), (5, 4), ["rows"]),
        ((1, 3, 5), (5, 4), ["rows", "columns", "bias"]),
        ((0, 6), (65, 4), ["rows"]),
        ((2, 5), (65, 4), ["rows", "jvp", "columns"]),
        ((4,), (65, 4), ["rows", "columns"]),
        ((1, 2, 4), (65, 4), ["rows", "columns", "columns"]),
    ],
    ids=str,
)
def test_what_is_not_wanted_costs_nothing(wanted, widths, kernels, device, launches, poisoned):
    got, expected = direct(device, wanted=tuple(i in wanted for i in range(7)), widths=widths)
    for launch, kernel in zip(launches, kernels, strict=True):
        assert kernel in launch.kernel
    for i, (name, ours, theirs) in enumerate(zip(NAMES, got, expected, strict=True)):
        assert (ours is not None) == (i in wanted)
        if ours is not None:
            assert_close([name], [ours], [theirs], TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_means_cost_no_digits(dtype, device, on_cuda, poisoned):
    """Neither of T (logits that all grow alike leave the softmax as it is) nor of dP (nor of U)."""
    given = problem((1, 1, 1, 20, 100, 8, 8), dtype, device, (1, 1, 20, 100))
    inputs, cotangent, tangents = given
    tangents[3] += 500.0
    inputs[2][..., 0] += 100.0
    tangents[2][..., 0] += 100.0
    assert_like_reference(inputs, cotangent, tangents, on_cuda)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)], ids=str)
def test_empty(sizes, device, on_cuda, poisoned):
    given = problem((2, 2, 1, *sizes), torch.float32, device)
    assert_like_reference(*given, on_cuda, is_causal=True)


def test_any_strides(device, on_cuda, poisoned):
    sizes = [(1, 30, 2, 8), (1, 30, 2, 8), (1, 2, 10, 30)]
    found = []
    for _ in range(2):
        q, k, v = (torch.randn(s, device=device) for s in sizes)
        found.append([q.transpose(1, 2), k.transpose(1, 2), v.transpose(2, 3)])
    found[1][2] = torch.randn(1, 1, 30, 10, device=device).expand(1, 2, 30, 10)
    cotangent = torch.randn(1, 1, 30, 10, device=device).expand(1, 2, 30, 10)
    assert_like_reference(found[0], cotangent, found[1], on_cuda)


def test_the_same_bits_under_any_schedule(device, running_cuda):
    found = []
    for schedule in ("sequential", 3):
        torch.manual_seed(0)
        with running_cuda(schedule):
            found.append(direct(device)[0])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


features = st.integers(1, 128)


@pytest.mark.exhaustive
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    N=st.integers(0, 80),
    M=st.integers(0, 70),
    widths=st.tuples(features, features),
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
    running_cuda, device, dtype, heads, N, M, widths, beside, bias, schedule, seed, **options
):
    torch.manual_seed(seed)
    shapes = []
    if bias is not None:
        shapes = [[n if own else 1 for n, own in zip((1, heads[0], N, M), bias, strict=True)]]
    given = problem((1, *heads, N, M, *widths), dtype, device, *shapes, beside=beside)
    with running_cuda(schedule) as log:
        assert_like_reference(*given, log, **options)
