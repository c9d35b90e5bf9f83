"""Attention's Triton kernels, forward and backward, in the interpreter against the reference in
fp64: every argument, ragged shapes, and whatever lies beyond the tensors' ends."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern
from genkern.backend import use_backend
from genkern.ops.attention.choice import WIDEST_FP64

# (B, H, Hk, N, M, d, dv): one of everything; a row more than a tile, so that a causal query sees
# one key of the next; ragged around the tiles; N < M and N > M; the SAGAN block; heads that share
# keys; a wide head. Every second one is causal.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 65, 129, 8, 8),
    (2, 3, 3, 5, 7, 3, 9),
    (1, 2, 1, 49, 97, 24, 96),
    (2, 4, 2, 131, 64, 17, 33),
    (1, 1, 1, 40, 200, 64, 8),
    (1, 1, 1, 20, 30, 256, 200),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 6e-3}
ROOM = 70  # more rows of NaN than a tile is high

every_dtype = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def in_nan(x):
    """The same numbers in memory that goes on with NaN, in rows and in features."""
    *leading, rows, last = x.shape
    room = x.new_full((*leading, rows + ROOM, last + 5), float("nan"))
    room[..., :rows, :last] = x
    return room[..., :rows, :last]


def tensors(shape, dtype):
    """q, k, v as leaves that lie amid NaN, and a cotangent."""
    B, H, Hk, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv), (B, H, N, dv)]
    q, k, v, cotangent = (in_nan(torch.randn(s, dtype=dtype)) for s in sizes)
    return [x.requires_grad_() for x in (q, k, v)], cotangent


def results(qkv, cotangent, biases=(), **options):
    """out, lse, and the gradients of everything."""
    out, lse = genkern.attention(*qkv, return_lse=True, enable_gqa=True, **options)
    weights = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view_as(lse)
    seen = torch.isfinite(lse)
    value = (out * cotangent).sum() + (lse.masked_fill(~seen, 0) * weights).sum()
    return out, lse, *torch.autograd.grad(value, [*qkv, *biases])


def assert_like_reference(qkv, cotangent, attn_mask=None, **options):
    dtype = qkv[0].dtype
    biases = [attn_mask] if attn_mask is not None and attn_mask.requires_grad else []
    with use_backend("triton"), genkern.explain() as log:
        torch.manual_seed(5)  # dropout's seed is drawn from torch's generator
        got = results(qkv, cotangent, biases, attn_mask=attn_mask, **options)
    assert [(choice.op, choice.backend) for choice in log] == [
        ("attention", "triton"),
        ("attention.backward", "triton"),
    ]
    wide = [x.detach().double().requires_grad_() for x in qkv]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.detach().double().requires_grad_(bool(biases))
        biases = [attn_mask] if biases else []
    with use_backend("reference"):
        torch.manual_seed(5)
        exact = results(wide, cotangent.double(), biases, attn_mask=attn_mask, **options)
    for name, g, e in zip(("out", "lse", "dq", "dk", "dv", "dbias"), got, exact, strict=False):
        size = e.nan_to_num(0, 0, 0).abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(
            g.double(),
            e,
            rtol=0,
            atol=TOLERANCE[dtype] * max(size, 1),
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


@every_dtype
def test_shapes(dtype, poisoned):
    for n, shape in enumerate(SHAPES):
        if dtype == torch.float64 and torch.cuda.is_available() and max(shape[-2:]) > WIDEST_FP64:
            continue  # only the interpreter has registers for them
        assert_like_reference(*tensors(shape, dtype), is_causal=n % 2 == 1)


OPTIONS = {
    "causal, last query at the last key": {"is_causal": True, "alignment": "lower_right"},
    "window": {"window": (9, 4)},
    "window to the left, last at last": {"window": (20, 0), "alignment": "lower_right"},
    "window beyond all": {"window": (500, None)},
    "softcap": {"softcap": 2.0},
    "negative scale": {"scale": -0.7},
    "zero scale": {"scale": 0.0},
    "distances": {"similarity": "l2", "scale": 0.3},
    "dropout": {"dropout_p": 0.3},
    "everything dropped": {"dropout_p": 1.0},
    "dropout, softcap, window": {"dropout_p": 0.2, "softcap": 3.0, "window": (30, 2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 45, 20, 12), (1, 2, 2, 33, 80, 16, 16)], ids=str)
def test_options(options, shape, poisoned):
    assert_like_reference(*tensors(shape, torch.float64), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_options_in_few_digits(dtype):
    shape = (2, 4, 2, 70, 45, 20, 12)
    mask = in_nan(torch.randn(2, 1, 70, 45, dtype=dtype)).requires_grad_()
    assert_like_reference(*tensors(shape, dtype), mask, dropout_p=0.2, softcap=3.0, window=(30, 2))


@pytest.mark.parametrize(
    "shape",
    [
        *[(2, 4, 70, 45), (2, 1, 70, 45), (70, 45), (1, 4, 1, 45), (2, 1, 70, 1), (1, 1, 1, 1)],
    ],
    ids=str,
)
def test_gradients_of_broadcast_biases(shape, poisoned):
    bias = torch.randn(shape, dtype=torch.float64).requires_grad_()
    qkv, cotangent = tensors((2, 4, 2, 70, 45, 20, 12), torch.float64)
    assert_like_reference(qkv, cotangent, bias, window=(20, 3), softcap=2.0)


def test_boolean_masks_and_rows_without_keys(poisoned):
    qkv, cotangent = tensors((2, 3, 3, 40, 37, 8, 8), torch.float64)
    mask = torch.rand(2, 1, 40, 37) > 0.5
    mask[:, :, 7] = False
    assert_like_reference(qkv, cotangent, mask)
    assert_like_reference(qkv, cotangent, mask[..., :1, :], is_causal=True)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "alignment": "lower_right"}], ids=str)
def test_padding_is_never_read(options, poisoned):
    (q, k, v), cotangent = tensors((3, 2, 2, 100, 90, 12, 20), torch.float64)
    lengths = torch.tensor([0, 90, 41])
    clean = [x.detach().clone() for x in (k, v)]
    for x in clean:
        for batch, length in enumerate(lengths):
            x[batch, :, length:] = 0
    dirty = [x.clone() for x in clean]
    for x in dirty:
        for batch, length in enumerate(lengths):
            x[batch, :, length:] = float("nan")
    found = []
    for k, v in (clean, dirty):
        qkv = [q, k.requires_grad_(), v.requires_grad_()]
        with use_backend("triton"):
            found.append(results(qkv, cotangent, key_lengths=lengths, **options))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert_like_reference([q, *clean], cotangent, key_lengths=lengths, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 2)}], ids=str)
def test_sequences_one_after_another(options, dropout_p, poisoned):
    q_starts, k_starts = torch.tensor([0, 0, 30, 101]), torch.tensor([0, 10, 75, 75])
    wide = [torch.randn(n, h, f, dtype=torch.float64) for n, h, f in ((101, 4, 9), (75, 2, 9))]
    wide.append(torch.randn(75, 2, 14, dtype=torch.float64))
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        q, k, v = (x.clone().requires_grad_() for x in wide)
        with use_backend(backend), genkern.explain() as log:
            out, lse = genkern.attention_varlen(
                *(q, k, v, q_starts, k_starts),
                enable_gqa=True,
                return_lse=True,
                dropout_p=dropout_p,
                **options,
            )
            grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert {choice.backend for choice in log} == {backend}
        found.append((out, lse, *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_starts_and_lengths_that_nobody_has_checked_stay_inside():
    """On a GPU their values are not read before the launch."""
    from genkern.ops.attention.arguments import Fixed, Settings
    from genkern.ops.attention.triton import problem
    from genkern.ops.attention.triton.call import Call
    from genkern.ops.attention.triton.forward import attention_forward

    q, k, v = (torch.randn(1, 1, 40, 16, dtype=torch.float64) for _ in range(3))
    call = Call((q, k, v, None, None), Fixed(), Settings(0.25))
    starts, lengths = torch.tensor([0, 60]), torch.tensor([10**6])
    call.problem = call.problem._replace(q_starts=starts, k_starts=starts, key_lengths=lengths)
    out, lse, *rows = (torch.zeros(1, 1, 40, dtype=torch.float64) for _ in range(4))
    out = torch.zeros_like(q)
    numbers = [problem.numbers(x, Fixed()) for x in (*rows[:2], lse)]
    call.over_queries(attention_forward, "forward", call.heads(out), *numbers)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)], ids=str)
def test_empty(sizes, poisoned):
    N, M, d, dv = sizes
    assert_like_reference(*tensors((2, 2, 1, N, M, d, dv), torch.float64), is_causal=True)
    assert_like_reference(*tensors((0, 2, 1, 5, 6, 4, 4), torch.float64))


def test_any_strides(poisoned):
    qkv = [torch.randn(2, 30, 3, 8, dtype=torch.float64).transpose(1, 2) for _ in range(2)]
    qkv.append(torch.randn(2, 3, 10, 30, dtype=torch.float64).transpose(2, 3))
    cotangent = torch.randn(1, 1, 30, 10, dtype=torch.float64).expand(2, 3, 30, 10)
    assert_like_reference([x.requires_grad_() for x in qkv], cotangent)


features = st.integers(1, 40)
bounds = st.none() | st.integers(0, 50)
any_arguments = given(
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    N=st.integers(0, 100),
    M=st.integers(0, 100),
    features=st.tuples(features, features),
    is_causal=st.booleans(),
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    window=st.none() | st.tuples(bounds, bounds),
    softcap=st.none() | st.floats(0.5, 5),
    bias=st.none() | st.tuples(*[st.booleans()] * 4),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def check_arguments(heads, N, M, features, bias, seed, **options):
    torch.manual_seed(seed)
    qkv, cotangent = tensors((2, *heads, N, M, *features), torch.float64)
    if bias is not None:
        shape = [n if own else 1 for n, own in zip((2, heads[0], N, M), bias, strict=True)]
        bias = torch.randn(shape, dtype=torch.float64).requires_grad_()
    assert_like_reference(qkv, cotangent, bias, **options)


@settings(max_examples=6, **unhurried)
@any_arguments
def test_any_arguments(**arguments):
    check_arguments(**arguments)


@pytest.mark.exhaustive
@settings(max_examples=200, **unhurried)
@any_arguments
def test_many_arguments(**arguments):
    check_arguments(**arguments)


def test_backward_is_deterministic():
    qkv, cotangent = tensors((2, 4, 2, 70, 45, 20, 12), torch.float32)
    with use_backend("triton"):
        first, second = (results(qkv, cotangent, is_causal=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_compiled_graphs_and_wide_heads():
    q, k, v = (torch.randn(1, 2, 30, 16) for _ in range(3))
    with use_backend("triton"), genkern.explain() as log:
        whole = torch.compile(genkern.attention, fullgraph=True)
        torch.testing.assert_close(whole(q, k, v), genkern.attention(q, k, v))
        assert {choice.backend for choice in log} == {"triton"}
        wide = torch.randn(1, 2, 3, 257)
        genkern.attention(wide, wide, wide)
    assert log[-1].backend == ("reference" if wide.is_cuda else "cpu")
    assert "has no attention for heads of more than 256 features" in log[-1].reason


def test_library_ops():
    """What torch.compile believes of the four passes: schemas and fakes."""
    from genkern.ops.attention.arguments import NOTHING_FIXED, Settings

    ops, check = torch.ops.genkern, torch.library.opcheck
    settings = Settings(0.25, right=0)
    sizes = [(2, 2, 9, 8), (2, 1, 12, 8), (2, 1, 12, 5), (1, 2, 9, 12), (2, 1, 12)]
    inputs = [torch.randn(size) for size in sizes]
    tangents = [torch.randn_like(x) for x in inputs]
    first, only = (*inputs, *NOTHING_FIXED), {"test_utils": ("test_schema", "test_faketensor")}
    with use_backend("triton"), genkern.explain() as log:
        rows = ops.attention(*first, *settings)[2]
        given = *first, rows, torch.randn(2, 2, 9, 5), torch.randn(2, 2, 9)
        check(ops.attention.default, (*first, *settings), **only)
        check(ops.attention_backward.default, (*given, [True] * 5, *settings), **only)
        check(ops.attention_jvp.default, (*first, rows, *tangents, *settings), **only)
        call = *given, *tangents, [True] * 7, *settings
        check(ops.attention_second.default, call, **only)
    assert {choice.backend for choice in log} == {"triton"}
