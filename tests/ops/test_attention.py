"""Attention: the CPU kernels against eager PyTorch in fp64, on every instruction-set level. How
exact with peaked softmaxes, drifting keys, features, in every pass: test_attention_exact.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# (B, H, N, M, d, dv): one of everything, ragged around lanes and blocks, more than one block of
# keys and of queries, N < M and N > M, the SAGAN block, wide heads.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 3, 9),
    (1, 2, 49, 97, 24, 96),
    (2, 1, 131, 64, 17, 33),
    (1, 1, 40, 200, 64, 8),
    (1, 1, 200, 33, 8, 64),
    (3, 1, 64, 16, 24, 96),
    (1, 2, 65, 65, 130, 70),
    (1, 1, 20, 30, 300, 270),
]
# Many query blocks for one head: partial sums of dK and dV, added up.
LONG = (1, 1, 700, 257, 16, 24)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
either_mask = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def tensors(shape, dtype=torch.float64):
    """q, k, v as leaves, and a cotangent."""
    B, H, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, H, M, d), (B, H, M, dv), (B, H, N, dv)]
    q, k, v, cotangent = (torch.randn(*s, dtype=torch.float64) for s in sizes)
    q, k, v, cotangent = (x.to(dtype) for x in (q, k, v, cotangent))
    return [x.requires_grad_() for x in (q, k, v)], cotangent


def eager(q, k, v, *, is_causal=False, scale=None):
    """As people write it, every step in the tensors' own dtype."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = q @ k.transpose(-2, -1) * scale
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1) @ v


def outputs_and_gradients(function, qkv, cotangent, **options):
    out = function(*qkv, **options)
    return out, *torch.autograd.grad(out, qkv, cotangent)


def by_kernels(qkv, cotangent, **options):
    """On the CPU kernels, forward and backward: nothing else may have run."""
    with genkern.explain() as log:
        results = outputs_and_gradients(genkern.attention, qkv, cotangent, **options)
    ran = [(choice.op, choice.backend) for choice in log]
    assert ran == [("attention", "cpu"), ("attention.backward", "cpu")]
    return results


def in_fp64(qkv, cotangent, **options):
    wide = [x.detach().double().requires_grad_() for x in qkv]
    return outputs_and_gradients(eager, wide, cotangent.double(), **options)


def error(got, exact):
    """Root mean square: the largest alone hangs on one rounding."""
    return (got.double() - exact).square().mean().sqrt().item() if exact.numel() else 0.0


def assert_exact(qkv, cotangent, **options):
    """Against fp64 at most 1.25 times eager's error in the same dtype, above a floor; twice that
    where there are so few numbers that either's error is a matter of luck."""
    got = by_kernels(qkv, cotangent, **options)
    rough = outputs_and_gradients(eager, qkv, cotangent, **options)
    exact = in_fp64(qkv, cotangent, **options)
    for name, g, r, e in zip(("out", "dq", "dk", "dv"), got, rough, exact, strict=True):
        assert g.dtype == qkv[0].dtype and g.shape == e.shape
        size = e.abs().max().item() if e.numel() else 0.0
        ratio = 1.25 if e.numel() >= 16 else 2.5
        limit = max(ratio * error(r, e), FLOOR[g.dtype] * max(size, 1.0))
        assert error(g, e) <= limit, (name, error(g, e), error(r, e), size)


# ---- Meaning ------------------------------------------------------------------------------------


@either_mask
@every_dtype
def test_exact_at_every_level(dtype, is_causal, cpu_level, poisoned):
    for shape in [*SHAPES, LONG]:
        assert_exact(*tensors(shape, dtype), is_causal=is_causal)


def test_the_reference_means_the_same():
    for is_causal in (False, True):
        qkv, cotangent = tensors((2, 3, 5, 7, 3, 9))
        options = {"is_causal": is_causal, "scale": 0.3}
        with genkern.use_backend("reference"), genkern.explain() as log:
            got = outputs_and_gradients(genkern.attention, qkv, cotangent, **options)
        assert {choice.backend for choice in log} == {"reference"} and len(log) == 2
        for g, e in zip(got, in_fp64(qkv, cotangent, **options), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.5, 3])
def test_scale(scale, cpu_level):
    assert_exact(*tensors((1, 2, 20, 30, 5, 6)), scale=scale)


@settings(max_examples=120, deadline=None)
@given(
    leading=st.lists(st.integers(0, 3), max_size=4),
    sizes=st.tuples(*[st.integers(0, 70)] * 2, *[st.integers(0, 40)] * 2),
    dtype=st.sampled_from(DTYPES[:2]),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(leading, sizes, dtype, is_causal, seed):
    torch.manual_seed(seed)
    N, M, d, dv = sizes
    qkv = [torch.randn(*leading, *s, dtype=dtype) for s in ((N, d), (M, d), (M, dv))]
    qkv = [x.requires_grad_() for x in qkv]
    cotangent = torch.randn(*leading, N, dv, dtype=dtype)
    got = by_kernels(qkv, cotangent, is_causal=is_causal, scale=0.5)
    exact = in_fp64(qkv, cotangent, is_causal=is_causal, scale=0.5)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)


def test_no_keys_and_no_features(cpu_level, poisoned):
    qkv, cotangent = tensors((1, 2, 3, 0, 4, 5), torch.float32)
    out, dq, dk, dv = by_kernels(qkv, cotangent)
    assert (out == 0).all() and (dq == 0).all() and dk.numel() == dv.numel() == 0
    qkv, cotangent = tensors((1, 2, 3, 7, 0, 5), torch.float32)
    out = by_kernels(qkv, cotangent)[0]
    torch.testing.assert_close(out, qkv[2].mean(-2, keepdim=True).expand_as(out))
    qkv, cotangent = tensors((1, 2, 0, 7, 4, 5), torch.float32)
    _, _, dk, dv = by_kernels(qkv, cotangent)
    assert (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_go_where_eager_sends_them(bad, cpu_level):
    for which in range(3):
        qkv, cotangent = tensors((1, 3, 20, 30, 5, 6), torch.float32)
        with torch.no_grad():
            qkv[which][0, 1, 4, 2] = bad
        got = by_kernels(qkv, cotangent)
        expected = outputs_and_gradients(eager, qkv, cotangent)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(torch.isfinite(g), torch.isfinite(e)), which


# ---- Memory layouts -----------------------------------------------------------------------------


def strided_views(shape, dtype):
    """name -> q, k, v of one shape that lie in memory differently."""
    B, H, N, M, d, dv = shape
    sizes = [(B, H, N, d), (B, H, M, d), (B, H, M, dv)]

    def each(make):
        return [make(*size) for size in sizes]

    def random(*size):
        return torch.randn(*size, dtype=torch.float64).to(dtype)

    return {
        "heads inside": each(lambda b, h, n, c: random(b, n, h, c).transpose(1, 2)),
        "batch inside": each(lambda b, h, n, c: random(n, h, b, c).permute(2, 1, 0, 3)),
        "every second row": each(lambda b, h, n, c: random(b, h, 2 * n, c)[:, :, ::2]),
        "padded": each(lambda b, h, n, c: random(b, h, n, c + 3)[..., 1:-2]),
        "features outside": each(lambda b, h, n, c: random(b, h, c, n).transpose(2, 3)),
        "one batch for all": each(lambda b, h, n, c: random(1, h, n, c).expand(b, -1, -1, -1)),
        "one row for all": each(lambda b, h, n, c: random(b, h, 1, c).expand(-1, -1, n, -1)),
        "misaligned": each(lambda b, h, n, c: random(b * h * n * c + 1)[1:].view(b, h, n, c)),
    }


@every_dtype
def test_any_strides(dtype, cpu_level, poisoned):
    shape = (2, 3, 50, 70, 8, 16)
    for name, views in strided_views(shape, dtype).items():
        qkv = [x.requires_grad_() for x in views]
        dense = [x.detach().contiguous().requires_grad_() for x in views]
        for cotangent in (
            torch.randn(2, 50, 3, 16).to(dtype).transpose(1, 2),
            torch.ones((), dtype=dtype).expand(2, 3, 50, 16),
        ):
            got = by_kernels(qkv, cotangent, is_causal=True)
            expected = by_kernels(dense, cotangent.contiguous(), is_causal=True)
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True)), name


def test_results_lie_like_their_inputs():
    views = strided_views((2, 3, 5, 7, 4, 6), torch.float32)
    for name in ("heads inside", "batch inside"):
        qkv = [x.requires_grad_() for x in views[name]]
        out = genkern.attention(*qkv)
        grads = torch.autograd.grad(out.sum(), qkv)
        assert [g.stride() for g in grads] == [x.stride() for x in qkv]
        order = sorted(range(4), key=lambda i: -qkv[0].stride(i))
        assert out.permute(order).is_contiguous()


def test_compact_inputs_are_not_copied(monkeypatch):
    """Transposed heads reach the kernel where they lie."""
    seen = []
    from genkern.ops.attention import kernels

    launch = kernels.native.attention_forward

    class Spy:
        def attention_forward(self, problem, *args):
            seen.extend(tensor[0] for tensor in problem[-3:])
            return launch(problem, *args)

    monkeypatch.setattr(kernels, "native", Spy())
    qkv = [torch.randn(2, 5, 3, 4).transpose(1, 2) for _ in range(3)]
    genkern.attention(*qkv, return_lse=True)  # which takes the long way (plans.py)
    assert seen == [x.data_ptr() for x in qkv]


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3, 2)])
def test_leading_dimensions(leading, cpu_level):
    qkv = [torch.randn(*leading, n, 4, requires_grad=True) for n in (5, 7, 7)]
    cotangent = torch.randn(*leading, 5, 4)
    got = by_kernels(qkv, cotangent)
    for g, e in zip(got, in_fp64(qkv, cotangent), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


def test_lazy_views():
    qkv = [torch.complex(torch.randn(2, 5, 4), torch.randn(2, 5, 4)) for _ in range(3)]
    negated = [x.conj().imag for x in qkv]
    assert all(x.is_neg() for x in negated)
    expected = genkern.attention(*(x.resolve_neg() for x in negated))
    assert torch.equal(genkern.attention(*negated), expected)


# ---- Threads ------------------------------------------------------------------------------------


@either_mask
@pytest.mark.parametrize("shape", [(1, 1, 800, 300, 24, 32), (2, 5, 100, 100, 32, 16)], ids=str)
def test_the_same_bits_on_any_number_of_threads(shape, is_causal, cpu_level):
    qkv, cotangent = tensors(shape, torch.float32)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 5, 2):
        torch.set_num_threads(count)
        results.append(by_kernels(qkv, cotangent, is_causal=is_causal))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- Derivatives --------------------------------------------------------------------------------


@either_mask
def test_gradcheck_twice(is_causal, cpu_level):
    qkv, _ = tensors((1, 2, 4, 5, 2, 3))

    def call(*x):
        return genkern.attention(*x, is_causal=is_causal)

    assert torch.autograd.gradcheck(call, qkv)
    assert torch.autograd.gradgradcheck(call, qkv)


def test_second_derivatives_say_where_they_ran():
    qkv, cotangent = tensors((1, 2, 5, 6, 3, 4))
    with genkern.explain() as log:
        out = genkern.attention(*qkv)
        grads = torch.autograd.grad(out, qkv, cotangent, create_graph=True)
        seconds = torch.autograd.grad(grads[0].square().sum(), qkv, create_graph=True)
        torch.autograd.grad(seconds[1].square().sum(), qkv[0])
    assert [(choice.op, choice.backend) for choice in log[:4]] == [
        ("attention", "cpu"),
        ("attention.backward", "cpu"),
        ("attention.second", "cpu"),
        ("attention.third", "reference"),
    ]


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_gradients_of_some_inputs_only(frozen, cpu_level, poisoned):
    qkv, cotangent = tensors((1, 2, 50, 60, 8, 12))
    everything = by_kernels(qkv, cotangent)
    for i in frozen:
        qkv[i] = qkv[i].detach()
    trained = [i for i in range(3) if i not in frozen]
    out = genkern.attention(*qkv)
    grads = torch.autograd.grad(out, [qkv[i] for i in trained], cotangent)
    for i, grad in zip(trained, grads, strict=True):
        assert torch.equal(grad, everything[1 + i])


def test_one_tensor_as_all_three():
    x = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(genkern.attention(x, x, x).square().sum(), x)
    (expected,) = torch.autograd.grad(eager(x, x, x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_an_input_changed_before_backward_is_noticed():
    qkv, _ = tensors((1, 1, 3, 3, 2, 2))
    out = genkern.attention(*qkv)
    with torch.no_grad():
        qkv[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.exhaustive
@either_mask
@every_dtype
def test_exact_on_the_whole_grid(dtype, is_causal, cpu_level):
    for N in (1, 15, 48, 49, 300):
        for M in (1, 7, 64, 65, 300):
            for d in (1, 8, 31, 64, 256):
                for dv in (1, 16, 97):
                    assert_exact(*tensors((1, 2, N, M, d, dv), dtype), is_causal=is_causal)
