"""Attention inside PyTorch: torch.library, autocast, checkpointing, memory."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import genkern
from genkern.ops.attention import kernels, reference
from genkern.ops.attention.arguments import NOTHING_FIXED, Settings

SIZES = {"q": (2, 3, 4, 2), "k": (2, 3, 5, 2), "v": (2, 3, 5, 3)}
CAUSAL = Settings(scale=0.5, right=0)


def qkv(dtype=torch.float32, grad=True):
    return [torch.randn(size).to(dtype).requires_grad_(grad) for size in SIZES.values()]


def library_op(q, k, v, bias=None, key_bias=None):
    return torch.ops.genkern.attention(q, k, v, bias, key_bias, *NOTHING_FIXED, *CAUSAL)[:2]


def public_op(q, k, v):
    return genkern.attention(q, k, v, is_causal=True, scale=0.5, return_lse=True)


def assert_all_close(got, expected, **tolerances):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, **tolerances)


# ---- torch.library ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    def leaf(*size):
        return torch.randn(size).to(dtype).requires_grad_()

    arithmetic = torch.float32 if dtype == torch.bfloat16 else dtype
    inputs = [*qkv(dtype), leaf(1, 3, 4, 5), torch.randn(2, 3, 5, dtype=arithmetic)]
    rows = torch.ops.genkern.attention(*inputs, *NOTHING_FIXED, *CAUSAL)[2].detach()
    cotangents = leaf(2, 3, 4, 3), torch.randn(2, 3, 4, dtype=arithmetic)
    tangents = [torch.randn_like(x).requires_grad_() for x in inputs]
    wanted = [True, False, True, True, True]
    first = (*inputs, *NOTHING_FIXED)
    check = torch.library.opcheck
    ops = torch.ops.genkern
    check(ops.attention.default, (*first, *CAUSAL))
    check(ops.attention_backward.default, (*first, rows, *cotangents, wanted, *CAUSAL))
    check(ops.attention_jvp.default, (*first, rows, *tangents, *CAUSAL))
    call = *first, rows, *cotangents, *tangents, [*wanted, True, True], *CAUSAL
    # Its derivative is the reference's, in which AOT finds nothing to check against the kernels.
    utilities = "test_schema", "test_autograd_registration", "test_faketensor"
    check(ops.attention_second.default, call, test_utils=utilities)
    transposed = [torch.randn(2, n, 3, 4).transpose(1, 2).requires_grad_() for n in (5, 7, 7)]
    check(ops.attention.default, (*transposed, None, None, *NOTHING_FIXED, *CAUSAL))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_derivative_of_the_library_op(backend):
    inputs = qkv(torch.float64)
    plain = tuple(x.detach() for x in inputs)
    twice = [torch.stack([x, 2 * x]) for x in plain]
    with genkern.use_backend(backend), genkern.explain() as log:
        assert torch.autograd.gradcheck(library_op, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(library_op, inputs, check_fwd_over_rev=True)
        got = torch.func.jvp(library_op, plain, plain)
        jacobian = torch.func.jacrev(library_op)(*plain)
        batched = torch.func.vmap(library_op)(*twice)
    assert {choice.backend for choice in log} == {backend}
    torch.testing.assert_close(got, torch.func.jvp(public_op, plain, plain))
    torch.testing.assert_close(jacobian, torch.func.jacrev(public_op)(*plain))
    torch.testing.assert_close(batched, torch.func.vmap(public_op)(*twice))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_library_op_on_the_reference_then_kernels(dtype):
    """A backward outside `use_backend` runs on the kernels, with what the reference kept."""
    inputs = qkv(dtype)
    expected = torch.autograd.grad(library_op(*inputs)[0].sum(), inputs)
    with genkern.use_backend("reference"):
        out, _ = library_op(*inputs)
    assert_all_close(torch.autograd.grad(out.sum(), inputs), expected)


def test_what_the_reference_keeps():
    q, k, v = qkv(torch.float64, grad=False)
    bias = torch.randn(1, 3, 1, 5, dtype=torch.float64)
    for x in (
        (q, k, v, None, None),
        (q, k, v, bias, None),
        (q, k, v, None, bias[:, :, 0].expand(2, 3, 5)),
    ):
        for scale in (0.5, -2.0, 0.0):
            for settings in (Settings(scale, right=0), Settings(scale, left=1, softcap=2.0)):
                rows = reference.softmax_rows(x, NOTHING_FIXED, settings)
                _, lse, kept = kernels.forward(x, NOTHING_FIXED, settings, True)
                torch.testing.assert_close(kept, rows)
                torch.testing.assert_close(reference.attention(x, NOTHING_FIXED, settings)[1], lse)
    nothing = reference.softmax_rows((q, k[:, :, :0], v, None, None), NOTHING_FIXED, CAUSAL)
    assert nothing.eq(0).all()


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.randn(size) for size in SIZES.values())
        out, lse = genkern.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 3, 4, 3) and lse.shape == (2, 3, 4)


# ---- Autocast, checkpointing, subclasses --------------------------------------------------------


def test_autocast_as_sdpa():
    q, k, v = qkv()
    mask = torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = genkern.attention(q, k.bfloat16(), v, mask)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == mask.grad.dtype == torch.float32
    expected = genkern.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert torch.equal(out, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert genkern.attention(*qkv(torch.float64)).dtype == torch.float64
        assert genkern.attention(q, k, v, mask.half()).dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant):
    inputs = qkv(torch.float64)

    def call(*x):
        return genkern.attention(*x, dropout_p=0.5).sin()

    def gradients(function):
        torch.manual_seed(3)
        return torch.autograd.grad(function(*inputs).sum(), inputs)

    def in_pieces(*x):
        return checkpoint(call, *x, use_reentrant=use_reentrant)

    if use_reentrant:  # knows only .backward()
        torch.manual_seed(3)
        in_pieces(*inputs).sum().backward()
        got = [x.grad for x in inputs]
    else:
        got = gradients(in_pieces)
    assert_all_close(got, gradients(call))


def test_parameters_are_taken():
    q, k, v = qkv(grad=False)
    with genkern.explain() as log:
        genkern.attention(torch.nn.Parameter(q), torch.nn.Parameter(k), v).sum().backward()
    assert [choice.backend for choice in log] == ["cpu", "cpu"]


def test_lazy_views_in_every_pass():
    q, k, v = qkv(torch.float64)
    tangents = [torch.complex(torch.zeros_like(x), x).conj().imag.detach() for x in (q, k, v)]
    assert all(x.is_neg() for x in tangents)
    out = genkern.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), out.detach(), create_graph=True)
    got = torch.autograd.grad(grads, (q, k, v), tangents, retain_graph=True)
    expected = torch.autograd.grad(grads, (q, k, v), [x.resolve_neg() for x in tangents])
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    plain = tuple(x.detach() for x in (q, k, v))
    got = torch.func.jvp(genkern.attention, plain, tuple(tangents))[1]
    solid = tuple(x.resolve_neg() for x in tangents)
    assert torch.equal(got, torch.func.jvp(genkern.attention, plain, solid)[1])


@pytest.mark.parametrize("changed", ["q", "k", "mask", "lengths"])
def test_what_changed_before_a_second_derivative_is_noticed(changed):
    q, k, v = qkv()
    mask, lengths = torch.zeros(4, 5), torch.tensor([3, 4])
    out = genkern.attention(q, k, v, mask, key_lengths=lengths)
    grads = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    with torch.no_grad():
        {"q": q, "k": k, "mask": mask, "lengths": lengths}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(grads[0].square().sum(), v)


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
