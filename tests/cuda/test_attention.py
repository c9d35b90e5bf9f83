"""Attention's CUDA kernels, forward and backward, against the reference in fp64: every argument,
ragged shapes, whatever lies beyond the tensors' ends. Second order: test_attention_second.py."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern
from genkern.backend import use_backend

# (B, H, Hk, N, M, d, dv): one of everything; rows of whole tiles and one more, so that a causal
# query sees one key of the next; ragged around the tiles; N < M and N > M; heads that share keys.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 129, 97, 64, 64),
    (2, 3, 3, 5, 7, 3, 9),
    (2, 4, 2, 131, 64, 17, 33),
    (1, 1, 1, 40, 200, 64, 8),
]
# The other sizes of heads that kernels are made for: the SAGAN block's, and wide ones.
WIDER = [(1, 2, 1, 49, 97, 24, 96), (1, 1, 1, 70, 140, 128, 72), (1, 1, 1, 40, 50, 256, 200)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ROOM = 70  # more rows of NaN than a tile is high

every_dtype = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def in_nan(x, features_of_room=5):
    """The same numbers in memory that goes on with NaN, in rows and in features."""
    *leading, rows, last = x.shape
    room = x.new_full((*leading, rows + ROOM, last + features_of_room), float("nan"))
    room[..., :rows, :last] = x
    return room[..., :rows, :last]


def tensors(shape, dtype, device, features_of_room=5):
    """q, k, v as leaves that lie amid NaN, and a cotangent."""
    B, H, Hk, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv), (B, H, N, dv)]
    drawn = (torch.randn(size).to(dtype).to(device) for size in sizes)
    q, k, v, cotangent = (in_nan(x, features_of_room) for x in drawn)
    return [x.requires_grad_() for x in (q, k, v)], cotangent


def results(qkv, cotangent, biases=(), **options):
    """out, lse, and the gradients of everything."""
    out, lse = genkern.attention(*qkv, return_lse=True, enable_gqa=True, **options)
    weights = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype, device=lse.device).view_as(lse)
    seen = torch.isfinite(lse)
    value = (out * cotangent).sum() + (lse.masked_fill(~seen, 0) * weights).sum()
    return out, lse, *torch.autograd.grad(value, [*qkv, *biases])


def assert_like_reference(running_cuda, qkv, cotangent, attn_mask=None, schedule=None, **options):
    dtype = qkv[0].dtype
    biases = [attn_mask] if attn_mask is not None and attn_mask.requires_grad else []
    with running_cuda(schedule or "sequential") as log:
        torch.manual_seed(5)  # dropout's seed is drawn from torch's generator
        got = results(qkv, cotangent, biases, attn_mask=attn_mask, **options)
    assert [(choice.op, choice.backend) for choice in log] == [
        ("attention", "cuda"),
        ("attention.backward", "cuda"),
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
@pytest.mark.parametrize("features_of_room", [5, 8], ids=["elements", "vectors"])
def test_shapes(dtype, features_of_room, running_cuda, device, poisoned):
    for n, shape in enumerate(SHAPES):
        given_tensors = tensors(shape, dtype, device, features_of_room)
        assert_like_reference(running_cuda, *given_tensors, is_causal=n % 2 == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rows_that_end_amid_a_vector(dtype, running_cuda, device, poisoned):
    """Rows begin at multiples of 16 bytes, and of the last 16 of q, k or v some are NaN: no tile
    may be copied in whole vectors, though in most nothing is hidden."""
    for d, dv in ((12, 24), (24, 12)):
        (q, k, _), _ = tensors((1, 2, 1, 40, 200, d, d), dtype, device, -d % 8 or 8)
        (_, _, v), cotangent = tensors((1, 2, 1, 40, 200, dv, dv), dtype, device, -dv % 8 or 8)
        assert all(x.stride(-2) % 8 == 0 for x in (q, k, v, cotangent))
        assert_like_reference(running_cuda, [q, k, v], cotangent)


def test_the_block_of_sagan(running_cuda, device, poisoned):
    given_tensors = tensors(WIDER[0], torch.bfloat16, device, 8)
    assert_like_reference(running_cuda, *given_tensors)


@pytest.mark.exhaustive
@every_dtype
@pytest.mark.parametrize("shape", WIDER, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 3.0}], ids=str)
def test_wider_heads(shape, dtype, options, running_cuda, device, poisoned):
    for features_of_room in (5, 8):
        given_tensors = tensors(shape, dtype, device, features_of_room)
        assert_like_reference(running_cuda, *given_tensors, **options)


@pytest.mark.parametrize("schedule", ["reversed", 1, 2])
def test_any_order_of_threads(schedule, running_cuda, device):
    given_tensors = tensors((1, 2, 1, 70, 150, 16, 16), torch.bfloat16, device, 8)
    assert_like_reference(running_cuda, *given_tensors, schedule=schedule, is_causal=True)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_options(options, dtype, running_cuda, device, poisoned):
    shape = (2, 4, 2, 70, 45, 20, 12) if dtype == torch.float32 else (1, 2, 2, 33, 80, 16, 16)
    given_tensors = tensors(shape, dtype, device, 8 if dtype == torch.float16 else 5)
    assert_like_reference(running_cuda, *given_tensors, **options)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 70, 45), (2, 1, 70, 45), (70, 45), (1, 4, 1, 45), (2, 1, 70, 1), (1, 1, 1, 1)],
    ids=str,
)
def test_gradients_of_broadcast_biases(shape, running_cuda, device, poisoned):
    bias = torch.randn(shape).to(device).requires_grad_()
    qkv, cotangent = tensors((2, 4, 2, 70, 45, 20, 12), torch.float32, device)
    assert_like_reference(running_cuda, qkv, cotangent, bias, window=(20, 3), softcap=2.0)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.float32], ids=["half", "single"])
def test_gradients_of_biases_in_few_digits(mask_dtype, running_cuda, device, poisoned):
    bias = in_nan(torch.randn(2, 1, 70, 45).to(mask_dtype).to(device)).requires_grad_()
    qkv, cotangent = tensors((2, 4, 2, 70, 45, 20, 72), torch.float16, device)
    options = {"dropout_p": 0.2, "softcap": 3.0, "window": (30, 2)}
    assert_like_reference(running_cuda, qkv, cotangent, bias, **options)


def test_boolean_masks_and_rows_without_keys(running_cuda, device, poisoned):
    qkv, cotangent = tensors((2, 3, 3, 40, 37, 8, 8), torch.float32, device)
    mask = (torch.rand(2, 1, 40, 37) > 0.5).to(device)
    mask[:, :, 7] = False
    assert_like_reference(running_cuda, qkv, cotangent, mask)
    assert_like_reference(running_cuda, qkv, cotangent, mask[..., :1, :], is_causal=True)


def test_large_biases_beyond_the_last_query(running_cuda, device, poisoned):
    qkv, cotangent = tensors((1, 1, 1, 33, 40, 8, 8), torch.float32, device)
    bias = torch.full((1, 1, 1, 40), 300.0, device=device)
    assert_like_reference(running_cuda, qkv, cotangent, bias)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "alignment": "lower_right"}], ids=str)
def test_padding_is_never_read(options, running_cuda, device, poisoned):
    (q, k, v), cotangent = tensors((3, 2, 2, 100, 90, 12, 20), torch.float32, device)
    lengths = torch.tensor([0, 90, 41], device=device)
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
        with running_cuda():
            found.append(results(qkv, cotangent, key_lengths=lengths, **options))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert_like_reference(running_cuda, [q, *clean], cotangent, key_lengths=lengths, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 2)}], ids=str)
def test_sequences_one_after_another(options, dropout_p, running_cuda, device, poisoned):
    q_starts = torch.tensor([0, 0, 30, 101], device=device)
    k_starts = torch.tensor([0, 10, 75, 75], device=device)
    sizes = [(101, 4, 9), (75, 2, 9), (75, 2, 14)]
    narrow = [torch.randn(size).to(device) for size in sizes]
    found = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(1)
        dtype = torch.float32 if backend == "cuda" else torch.float64
        q, k, v = (x.to(dtype).requires_grad_() for x in narrow)
        with running_cuda() as log, use_backend(backend):
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
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (5, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)], ids=str)
def test_empty(sizes, running_cuda, device, poisoned):
    N, M, d, dv = sizes
    of_nothing = tensors((2, 2, 1, N, M, d, dv), torch.float32, device)
    assert_like_reference(running_cuda, *of_nothing, is_causal=True)
    assert_like_reference(running_cuda, *tensors((0, 2, 1, 5, 6, 4, 4), torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_strides(dtype, running_cuda, device, poisoned):
    def drawn(*size):
        return torch.randn(size).to(dtype).to(device)

    qkv = [drawn(2, 30, 3, 8).transpose(1, 2) for _ in range(2)]
    qkv.append(drawn(2, 3, 10, 30).transpose(2, 3))
    cotangent = drawn(1, 1, 30, 10).expand(2, 3, 30, 10)
    assert_like_reference(running_cuda, [x.requires_grad_() for x in qkv], cotangent)


features = st.integers(1, 40)
bounds = st.none() | st.integers(0, 50)
any_arguments = given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    N=st.integers(0, 100),
    M=st.integers(0, 100),
    features=st.tuples(features, features),
    features_of_room=st.sampled_from([0, 5, 8]),
    is_causal=st.booleans(),
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    window=st.none() | st.tuples(bounds, bounds),
    softcap=st.none() | st.floats(0.5, 5),
    bias=st.none() | st.tuples(*[st.booleans()] * 4),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def check_arguments(
    running_cuda, device, dtype, heads, N, M, features, features_of_room, bias, seed, **options
):
    torch.manual_seed(seed)
    qkv, cotangent = tensors((2, *heads, N, M, *features), dtype, device, features_of_room)
    if bias is not None:
        shape = [n if own else 1 for n, own in zip((2, heads[0], N, M), bias, strict=True)]
        bias = torch.randn(shape).to(dtype).to(device).requires_grad_()
    assert_like_reference(running_cuda, qkv, cotangent, bias, schedule=seed, **options)


@settings(max_examples=6, **unhurried)
@any_arguments
def test_any_arguments(running_cuda, **arguments):
    check_arguments(running_cuda, "cuda" if torch.cuda.is_available() else "cpu", **arguments)


@pytest.mark.exhaustive
@settings(max_examples=200, **unhurried)
@any_arguments
def test_many_arguments(running_cuda, **arguments):
    check_arguments(running_cuda, "cuda" if torch.cuda.is_available() else "cpu", **arguments)


def test_the_mask_of_dropout_is_the_cpu_kernels(running_cuda, device):
    q, k = (torch.zeros(2, 3, n, 8, device=device) for n in (40, 64))
    v = torch.eye(64, device=device).expand(2, 3, 64, 64)
    found = []
    for backend in ("cuda", "cpu"):
        on = device if backend == "cuda" else "cpu"
        torch.manual_seed(7)
        with running_cuda(), use_backend(backend):
            found.append(genkern.attention(*(x.to(on) for x in (q, k, v)), dropout_p=0.5) > 0)
    assert 0.4 < found[0].double().mean() < 0.6
    if device == "cpu":  # a GPU's generator draws another seed
        assert torch.equal(found[0], found[1])


def test_backward_is_deterministic(running_cuda, device):
    qkv, cotangent = tensors((2, 4, 2, 70, 45, 20, 12), torch.float32, device)
    found = []
    for schedule in (1, 2):
        with running_cuda(schedule):
            found.append(results(qkv, cotangent, is_causal=True))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_launches(launches, on_cuda, device):
    """One forward; by rows, by columns and a bias's tiles backward; wide heads by columns twice."""

    def names(d, mask):
        qkv, cotangent = tensors((1, 1, 1, 9, 9, d, d), torch.bfloat16, device)
        before = len(launches)
        results(qkv, cotangent, [mask] if mask is not None else [], attn_mask=mask)
        return [launch.kernel for launch in launches[before:]]

    mask = torch.randn(9, 9, dtype=torch.bfloat16, device=device).requires_grad_()
    ours = ["7forward", "13backward_rows", "16backward_columns", "13bias_gradient"]
    found = names(16, mask)
    assert len(found) == 4 and all(a in b for a, b in zip(ours, found, strict=True))


def test_what_cuda_does_not_do(running_cuda, device):
    wide = torch.randn(1, 2, 3, 257, device=device)
    double = torch.randn(1, 2, 3, 8, dtype=torch.float64, device=device)
    for x, what in ((wide, "heads of more than 256 features"), (double, "torch.float64")):
        with running_cuda() as log:
            genkern.attention(x, x, x)
        assert log[-1].backend != "cuda"
        assert f"has no attention for {what}" in log[-1].reason


def test_cpu_tensors_need_a_gpu():
    x = torch.randn(1, 1, 2, 4)
    with use_backend("cuda"), pytest.raises(ValueError, match="needs tensors on a cuda device"):
        genkern.attention(x, x, x)


def test_starts_and_lengths_that_nobody_has_checked_stay_inside(running_cuda, device):
    """On a GPU their values are not read before the launch."""
    from genkern.ops.attention import cuda
    from genkern.ops.attention.arguments import Fixed, Settings

    q, k, v = (torch.randn(1, 1, 40, 16, device=device) for _ in range(3))
    starts = torch.tensor([0, 60], device=device)
    fixed = Fixed(torch.tensor([10**6], device=device), starts, starts)
    unchecked = Settings(0.25, longest_q=40, longest_k=40)
    with running_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "check_longest", lambda inputs, fixed, settings: settings)
        out = cuda.forward((q, k, v, None, None), fixed, unchecked, False)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected)
