"""Attention inside PyTorch: arguments, transforms, torch.compile, autocast, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import genkern
from genkern.ops.attention import op, reference

ARGUMENTS = {
    "q": (2, 5, 4),
    "k": (2, 7, 4),
    "v": (2, 7, 6),
}


def qkv(dtype=torch.float32, grad=True, **shapes):
    return [
        torch.randn(shapes.get(name, shape)).to(dtype).requires_grad_(grad)
        for name, shape in ARGUMENTS.items()
    ]


# ---- Arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (4,)}, r"q must have at least two dimensions, \[..., rows, features\], not \(4,\)"),
        ({"k": (3, 7, 4)}, r"k must have q's leading dimensions, \(2,\), not \(3,\)"),
        ({"v": (7, 6)}, r"v must have q's leading dimensions, \(2,\), not \(\)"),
        ({"k": (2, 7, 3)}, "k must have as many features as q, 4, not 3"),
        ({"v": (2, 8, 6)}, "v must have one row for each key, 7, not 8"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=f"^attention: {message}$"):
        genkern.attention(*qkv(**shapes))


def test_arguments_of_the_wrong_kind():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="attention: k must be a tensor, not list"):
        genkern.attention(q, k.tolist(), v)
    with pytest.raises(TypeError, match=r"attention: v must have q's dtype, torch.float32, not"):
        genkern.attention(q, k, v.double())
    with pytest.raises(TypeError, match="attention: q must be of a floating-point dtype, not"):
        genkern.attention(q.long(), k, v)
    with pytest.raises(ValueError, match="attention: v must be on q's device, cpu, not meta"):
        genkern.attention(q, k, v.to("meta"))
    with pytest.raises(TypeError, match="attention: scale must be a number or None, not str"):
        genkern.attention(q, k, v, scale="1")
    with pytest.raises(ValueError, match="attention: scale must be finite, not nan"):
        genkern.attention(q, k, v, scale=float("nan"))
    with pytest.raises(TypeError, match="takes 3 positional arguments"):
        genkern.attention(q, k, v, True)


def test_sdpa_means_the_same():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (33, 50, 50))
    for options in ({}, {"is_causal": True}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(genkern.attention(q, k, v, **options), expected)


# ---- Transforms: never a silent zero ------------------------------------------------------------


def library_op(q, k, v):
    return torch.ops.genkern.attention(q, k, v, False, 0.5)[0]


@pytest.mark.parametrize("function", [genkern.attention, library_op])
def test_tangents_and_batches_are_refused(function):
    q, k, v = (x[None] for x in qkv(grad=False))
    with pytest.raises(NotImplementedError, match="jvp, vmap, grad"):
        torch.func.jvp(function, (q, k, v), (q, k, v))
    with pytest.raises(NotImplementedError, match="jvp, vmap, grad"):
        torch.func.vmap(function)(q[None], k[None], v[None])
    with pytest.raises((NotImplementedError, RuntimeError), match="vmap, grad"):
        torch.func.grad(lambda q: function(q, k, v).sum())(q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(forward_ad.make_dual(q, q), k, v)


def test_tangents_are_refused_when_compiled():
    q, k, v = qkv(grad=False)
    compiled = torch.compile(genkern.attention, backend="aot_eager")
    with forward_ad.dual_level(), pytest.raises(Exception, match=r"attention: torch\.func"):
        compiled(forward_ad.make_dual(q, q), k, v)
    inside = torch.compile(
        lambda q: torch.func.jvp(lambda q: genkern.attention(q, k, v), (q,), (q,)),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match=r"attention: torch\.func"):
        inside(q)


def test_transforms_on_the_reference():
    q, k, v = qkv(torch.float64, grad=False)
    with genkern.use_backend("reference"):
        out, tangent = torch.func.jvp(genkern.attention, (q, k, v), (q, k, v))
        batched = torch.func.vmap(genkern.attention)(q, k, v)
    step = 1e-6
    plus, minus = (genkern.attention(*(x * (1 + s) for x in (q, k, v))) for s in (step, -step))
    torch.testing.assert_close(tangent, (plus - minus) / (2 * step), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(batched, out)


# ---- torch.library and torch.compile ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    heads = [x[:, None].detach().requires_grad_() for x in qkv(dtype)]
    torch.library.opcheck(torch.ops.genkern.attention.default, (*heads, True, 0.3))
    transposed = [torch.randn(2, n, 3, 4).transpose(1, 2).requires_grad_() for n in (5, 7, 7)]
    torch.library.opcheck(torch.ops.genkern.attention.default, (*transposed, False, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, dtype):
    def step(q, k, v):
        return genkern.attention(q * 2, k, v, is_causal=True).transpose(-2, -1).float().sin()

    inputs = qkv(dtype)
    expected = step(*inputs)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with genkern.explain() as log:
        got = compiled(*inputs)
        cotangent = torch.randn_like(got)
        grads = torch.autograd.grad(got, inputs, cotangent)
    ran = [(choice.op, choice.backend) for choice in log]
    assert ran == [("attention", "cpu"), ("attention.backward", "cpu")]
    torch.testing.assert_close(got, expected)
    for g, e in zip(grads, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(g, e)


def test_compiled_with_one_tensor_as_all_three():
    x = torch.randn(2, 9, 4, requires_grad=True)
    compiled = torch.compile(lambda x: genkern.attention(x, x, x), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(genkern.attention(x, x, x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_compiled_on_changing_shapes():
    compiled = torch.compile(genkern.attention, fullgraph=True, dynamic=True)
    for rows in (5, 8, 13):
        inputs = qkv(q=(2, 3, rows, 4), k=(2, 3, 7, 4), v=(2, 3, 7, 6))
        torch.testing.assert_close(compiled(*inputs), genkern.attention(*inputs))


def test_a_second_derivative_through_the_library_op():
    inputs = [x[:, None].detach().requires_grad_() for x in qkv(torch.float64)]
    assert torch.autograd.gradgradcheck(library_op, inputs)


def test_a_second_derivative_through_a_compiled_op_is_refused():
    inputs = qkv()
    out = torch.compile(genkern.attention, backend="aot_eager")(*inputs)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        torch.autograd.grad(grads[0].square().sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_library_op_on_the_reference_then_kernels(dtype):
    """A backward outside `use_backend` runs on the kernels, with what the reference kept."""
    inputs = [x[:, None].detach().requires_grad_() for x in qkv(dtype)]
    expected = torch.autograd.grad(library_op(*inputs).sum(), inputs)
    with genkern.use_backend("reference"):
        out = library_op(*inputs)
    for g, e in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_what_the_reference_keeps():
    q, k, _ = qkv(torch.float64, grad=False)
    future = torch.ones(5, 7, dtype=torch.bool).triu(1)
    for scale in (0.5, -2.0, 0.0):
        shift, total = reference.softmax_rows(q, k, True, scale)
        logits = (scale * q @ k.transpose(1, 2)).masked_fill(future, -torch.inf)
        torch.testing.assert_close(abs(scale) * shift + total.log(), logits.logsumexp(-1))
        rows = op._forward(*(x[None] for x in (q, k, k)), True, scale)[2]
        torch.testing.assert_close(rows[:, 0], torch.stack([shift, total]))
    assert reference.softmax_rows(q, k[:, :0]).eq(0).all()


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        out = genkern.attention(*qkv())
    assert out.shape == (2, 5, 6)


# ---- Autocast, subclasses -----------------------------------------------------------------------


def test_autocast_as_sdpa():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = genkern.attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    expected = genkern.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert genkern.attention(*qkv(torch.float64)).dtype == torch.float64


def test_parameters_are_taken():
    q, k, v = qkv(grad=False)
    with genkern.explain() as log:
        genkern.attention(torch.nn.Parameter(q), torch.nn.Parameter(k), v).sum().backward()
    assert [choice.backend for choice in log] == ["cpu", "cpu"]


# ---- Memory -------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch, genkern
N = int(sys.argv[1])
q, k, v = (torch.randn(1, 1, N, 32, requires_grad=True) for _ in range(3))
genkern.attention(*(x[:, :, :64] for x in (q, k, v))).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
genkern.attention(q, k, v, is_causal=True).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_linear():
    """Peak growth of forward and backward in a fresh process, against one N×M matrix of floats."""
    N = 8192
    command = [sys.executable, "-c", PEAK, str(N)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.15 * N * N * 4
