"""Attention under torch.func and in forward mode: fused on the kernels, equal to the reference."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import genkern

SIZES = {"q": (2, 3, 4, 2), "k": (2, 3, 5, 2), "v": (2, 3, 5, 3)}
STARTS = torch.tensor([0, 1, 1, 4])


@pytest.fixture
def qkv():
    return [torch.randn(s, dtype=torch.float64) for s in SIZES.values()]


def ops(*names):
    return {"attention", *(f"attention.{name}" for name in names)}


def assert_fused(function, *names, reference=()):
    """`function()` is right, and runs these on the kernels and those on the reference."""
    with genkern.explain() as log:
        got = function()
    assert {c.op for c in log if c.backend == "cpu"} == ops(*names)
    assert {c.op for c in log if c.backend == "reference"} == {f"attention.{x}" for x in reference}
    with genkern.use_backend("reference"):
        expected = function()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def loss(*args, **options):
    return genkern.attention(*args, **options).sin().sum()


def test_jvp(qkv, cpu_level, poisoned):
    q, k, v = qkv
    tangents = tuple(torch.randn_like(x) for x in qkv)
    bias = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_fused(lambda: jvp(genkern.attention, tuple(qkv), tangents), "jvp")
    assert_fused(
        lambda: jvp(
            lambda v, b: genkern.attention(q, k, v, b, is_causal=True, return_lse=True),
            (v, bias),
            (tangents[2], bias.cos()),
        ),
        "jvp",
    )


def test_gradients_and_mixed_modes(qkv, cpu_level, poisoned):
    q, k, v = qkv
    tangents = tuple(torch.randn_like(x) for x in qkv)

    def gradients(*x):
        return grad(loss, (0, 1, 2))(*x)

    def squared_gradient(q):
        return grad(lambda q: loss(q, k, v))(q).square().sum()

    def squared_tangent(q):
        return jvp(lambda q, v: genkern.attention(q, k, v), (q, v), tangents[::2])[1].square().sum()

    assert_fused(lambda: gradients(*qkv), "backward")
    assert_fused(lambda: grad(squared_gradient)(q), "backward", "second")
    assert_fused(lambda: jvp(gradients, tuple(qkv), tangents), "backward", "second", "jvp")
    assert_fused(lambda: grad(squared_tangent)(q), "jvp", "second")


def test_third_derivatives_are_the_references(qkv):
    q, k, v = qkv

    def squared_gradient(q):
        return grad(lambda q: loss(q, k, v))(q).square().sum()

    def tangent(q):
        return jvp(lambda q: genkern.attention(q, k, v), (q,), (v[..., :4, :2],))[1]

    assert_fused(
        lambda: grad(lambda q: grad(squared_gradient)(q).square().sum())(q),
        "backward",
        "second",
        reference=["third"],
    )
    assert_fused(
        lambda: jvp(grad(squared_gradient), (q,), (q,)),
        "backward",
        "second",
        "jvp",
        reference=["third"],
    )
    assert_fused(lambda: jvp(tangent, (q,), (q,)), "jvp", reference=["jvp.jvp"])


def test_jacobians(qkv):
    small = [x[:1, :1] for x in qkv]
    bias = torch.randn(1, 4, 5, dtype=torch.float64)
    assert_fused(lambda: jacrev(genkern.attention, (0, 1, 2))(*qkv), "backward")
    assert_fused(lambda: jacfwd(genkern.attention, (0, 1, 2))(*qkv), "jvp")
    every = "backward", "second", "jvp"
    assert_fused(lambda: hessian(loss, (0, 1, 2))(*small), *every)
    assert_fused(lambda: hessian(lambda b: loss(*small, b))(bias), *every)
    assert_fused(lambda: jacrev(jacrev(loss))(*small), "backward", "second")


def test_vmap(qkv, cpu_level, poisoned):
    q, k, v = qkv
    bias = torch.randn(3, 4, 5, dtype=torch.float64)
    lengths = torch.tensor([2, 4])
    twice, biases = torch.stack([q, 2 * q]), torch.stack([bias, bias.sin()])
    attention = genkern.attention
    assert torch.equal(vmap(attention)(q, k, v), attention(q, k, v))
    for function in (
        lambda: vmap(attention)(q, k, v),
        lambda: vmap(attention, (2, None, 0), 1)(q.movedim(0, 2), k[0], v),
        lambda: vmap(attention, (1, None, None))(twice.movedim(0, 1), k, v),
        lambda: vmap(lambda q, b: attention(q, k, v, b, is_causal=True))(twice, biases),
        lambda: vmap(lambda q, n: attention(q, k, v, key_lengths=n))(
            twice, torch.stack([lengths, lengths + 1])
        ),
        lambda: vmap(lambda q, k, v, n: attention(q, k, v, key_lengths=n))(q, k, v, lengths),
        lambda: vmap(vmap(attention))(q, k, v),
    ):
        assert_fused(function)
    shared = vmap(grad(lambda b, q: loss(q, k, v, b)), (None, 0))
    assert_fused(lambda: shared(bias, twice), "backward")
    assert_fused(lambda: vmap(grad(loss, (0, 1, 2)))(q, k, v), "backward")
    assert_fused(
        lambda: grad(lambda b: vmap(lambda q: loss(q, k, v, b))(twice).sum())(bias), "backward"
    )
    assert_fused(
        lambda: vmap(lambda q, t: jvp(lambda q: attention(q, k, v), (q,), (t,)))(twice, twice),
        "jvp",
    )
    assert_fused(lambda: jvp(vmap(attention), (q, k, v), (q, k, v)), "jvp")


def test_vmap_over_sequences(cpu_level, poisoned):
    q, k, v = (torch.randn(2, 4, 3, n, dtype=torch.float64) for n in (2, 2, 5))

    def call(*x):
        return genkern.attention_varlen(*x, STARTS, STARTS, is_causal=True, return_lse=True)

    assert_fused(lambda: vmap(call)(q, k, v))
    gradients = grad(lambda *x: call(*x)[0].sin().sum(), (0, 1, 2))
    assert_fused(lambda: vmap(gradients, (0, None, 0))(q, k[0], v), "backward")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_vmap_cannot(qkv, backend):
    with genkern.use_backend(backend):
        with pytest.raises(
            NotImplementedError, match=r"^attention: dropout under torch\.func\.vmap"
        ):
            vmap(lambda *x: genkern.attention(*x, dropout_p=0.5))(*qkv)
        with pytest.raises(
            NotImplementedError, match=r"^attention: dropout under torch\.func\.vmap"
        ):
            vmap(grad(lambda *x: loss(*x, dropout_p=0.5)))(*qkv)


# ---- Forward mode of torch.autograd -------------------------------------------------------------


def test_dual_numbers(qkv, cpu_level, poisoned):
    q, k, v = qkv
    tangent = torch.randn_like(q)

    def forward():
        with forward_ad.dual_level():
            out = genkern.attention(forward_ad.make_dual(q, tangent), k, v)
            return forward_ad.unpack_dual(out).tangent

    def reverse_over_forward():
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        with forward_ad.dual_level():
            out = genkern.attention(forward_ad.make_dual(leaves[0], tangent), leaves[1], v)
            derivative = forward_ad.unpack_dual(out).tangent
        return torch.autograd.grad(derivative.sin().sum(), leaves)

    def forward_over_reverse():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q.clone().requires_grad_(), tangent)
            (gradient,) = torch.autograd.grad(loss(dual, k, v), dual, create_graph=True)
            return forward_ad.unpack_dual(gradient).tangent.detach()

    assert_fused(forward, "jvp")
    assert_fused(reverse_over_forward, "jvp", "second")
    assert_fused(forward_over_reverse, "backward", "second", "jvp")


@pytest.mark.parametrize("through_the_tangent", [False, True])
def test_meanflow(through_the_tangent, cpu_level):
    """The loss of MeanFlow (Geng et al. 2025): a tangent through the net, differentiated again in
    reverse, as published with a detached target and without."""
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    z, velocity = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    t, r = torch.rand(2, 3, 1, 1, dtype=torch.float64)

    def net(z, r, t):
        heads = ((z + t - r) @ weight).view(3, 4, 2, 3).transpose(1, 2)
        out = genkern.attention(heads, 2 * heads, heads.sin())
        return out.transpose(1, 2).reshape(3, 4, 6)

    def gradient():
        u, dudt = jvp(net, (z, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))
        target = velocity - (t - r) * dudt
        target = target if through_the_tangent else target.detach()
        return torch.autograd.grad((u - target).square().mean(), weight)

    names = ("jvp", "backward", "second") if through_the_tangent else ("jvp", "backward")
    assert_fused(gradient, *names)


def test_one_tensor_as_all_three(cpu_level):
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64)

    def three_derivatives():
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf, leaf, leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad(second.sin().sum(), leaf)
        return first.detach(), second.detach(), third

    assert_fused(three_derivatives, "backward", "second", reference=["third"])
