"""Spectral normalization: derivatives, what the backward keeps, torch.library and torch.compile."""

import pytest
import torch
from torch.func import jvp

import genkern
from genkern.ops.spectral_norm import op, reference

SHAPES = [((4, 3), 0), ((3, 2, 2, 2), 0), ((2, 3, 2), 1)]
BACKENDS = ["cpu", "reference"]


@pytest.fixture
def layers():
    weights = [torch.randn(s, dtype=torch.double, requires_grad=True) for s, _ in SHAPES]
    dims = [dim for _, dim in SHAPES]
    us = [torch.randn(w.shape[d], dtype=torch.double) for w, d in zip(weights, dims, strict=True)]
    vs = [
        torch.randn(w.numel() // w.shape[d], dtype=torch.double)
        for w, d in zip(weights, dims, strict=True)
    ]
    return weights, us, vs, dims


def library(weights, us, vs, dims):
    """By the library op, with stored vectors (then Ŵ is a plain function of W)."""
    none = [0] * len(weights)
    weights, sigma, _ = torch.ops.genkern.spectral_norm(weights, us, vs, dims, none, 0.0, "u_first")
    return *weights, sigma


def function(weights, us, vs, dims):
    result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=0)
    return *result.weights, result.sigma


@pytest.mark.parametrize("call", [function, library])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck(layers, call, backend):
    weights, *rest = layers
    with genkern.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *w: call(list(w), *rest), weights)
        assert torch.autograd.gradgradcheck(lambda *w: call(list(w), *rest), weights)


@pytest.mark.parametrize("iterations", [0, 1])
def test_third_derivative(layers, iterations):
    """Also with an update in the forward: u and v are constants."""
    weights, us, vs, dims = layers

    def derivatives(call):
        value = sum((w**3).sum() for w in call()[0])
        for _ in range(3):
            grads = torch.autograd.grad(value, weights, create_graph=True)
            value = sum((g**2).sum() for g in grads)
        return grads

    n = [iterations] * 3
    got = derivatives(lambda: op.spectral_norm(weights, us, vs, dims, n_power_iterations=n))
    exact = derivatives(lambda: reference.spectral_norm(weights, us, vs, dims, n, 1e-12, "u_first"))
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8 * e.abs().max().item())


def test_create_graph_says_where_it_ran(layers):
    weights, us, vs, dims = layers
    result = op.spectral_norm(weights, us, vs, dims)
    with genkern.explain() as log:
        torch.autograd.grad(result.weights[0].sum(), weights[0], create_graph=True)
    assert [(c.op, c.backend) for c in log] == [("spectral_norm.backward", "reference")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_gradients(layers, backend):
    """A frozen weight, an unused Ŵ, only σ."""
    weights, us, vs, dims = layers
    weights[1].requires_grad_(False)
    with genkern.use_backend(backend):
        result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=0)
    first, third = weights[0], weights[2]
    grads = torch.autograd.grad(
        result.weights[2].sum(), [first, third], retain_graph=True, allow_unused=True
    )
    assert grads[0] is None
    (of_sigma,) = torch.autograd.grad(result.sigma[0], first)
    torch.testing.assert_close(of_sigma, torch.outer(us[0], vs[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_after_the_weights_have_changed(layers, backend):
    """Two forwards before one backward; an optimizer's step between forward and backward, twice."""
    weights, us, vs, dims = layers

    def losses():
        for _ in range(2):
            result = op.spectral_norm(weights, us, vs, dims, update=True)
            yield sum((w**2 * torch.arange(w.numel()).view(w.shape)).sum() for w in result.weights)

    before = [x.clone() for x in (*us, *vs)]
    with genkern.use_backend(backend):
        expected = torch.autograd.grad(sum(losses()), weights)
        for x, old in zip((*us, *vs), before, strict=True):
            x.copy_(old)
        loss = sum(losses())
    with torch.no_grad():
        for weight in weights:
            weight.mul_(-3)
    for keep in (True, False):
        got = torch.autograd.grad(loss, weights, retain_graph=keep)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_a_changed_result_is_noticed(layers):
    weights, us, vs, dims = layers
    result = op.spectral_norm(weights, us, vs, dims)
    with torch.no_grad():
        result.weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sigma.sum().backward()


def test_cotangents_in_other_forms(layers):
    """Expanded, sparse, zero-tensor."""
    weights, us, vs, dims = layers
    result = op.spectral_norm(weights, us, vs, dims)
    one = torch.ones((), dtype=torch.double)
    dense = torch.ones(4, 3, dtype=torch.double)
    expected = torch.autograd.grad(result.weights[0], weights[0], dense, retain_graph=True)
    for other in (one.expand(4, 3), dense.to_sparse()):
        got = torch.autograd.grad(result.weights[0], weights[0], other, retain_graph=True)
        torch.testing.assert_close(got, expected)
    zero = torch._efficientzerotensor((4, 3), dtype=torch.double)
    (got,) = torch.autograd.grad(result.weights[0], weights[0], zero)
    assert not got.any()


def test_forward_mode_is_refused(layers):
    weights, us, vs, dims = layers
    with pytest.raises((RuntimeError, NotImplementedError)):
        jvp(
            lambda w: op.spectral_norm([w], us[:1], vs[:1], dims[:1]).weights[0],
            (weights[0].detach(),),
            (torch.ones_like(weights[0]),),
        )


def test_a_subclass_is_refused_by_name(layers):
    class Other(torch.Tensor):
        pass

    weights, us, vs, dims = layers
    weights[0] = weights[0].detach().as_subclass(Other)
    with pytest.raises(TypeError, match="is a Other, and the kernels read plain tensors only"):
        op.spectral_norm(weights, us, vs, dims)


@pytest.mark.parametrize("order", reference.ORDERS)
def test_opcheck(layers, order):
    weights, us, vs, dims = layers
    arguments = (weights, us, vs, dims, [0, 1, 2], 1e-12, order)
    torch.library.opcheck(torch.ops.genkern.spectral_norm, arguments)


@pytest.mark.parametrize("update", [False, True])
def test_compile(layers, update):
    """Outputs, gradients and updated vectors as eager's; the same weight twice, too."""
    weights, us, vs, dims = layers
    weights, dims = [*weights, weights[0]], [*dims, dims[0]]
    us, vs = [*us, us[0].clone()], [*vs, vs[0].clone()]
    other = [x.clone() for x in us], [x.clone() for x in vs]

    def step(us, vs):
        result = op.spectral_norm(weights, us, vs, dims, update=update)
        return [*result.weights, result.sigma]

    got = torch.compile(step, fullgraph=True)(us, vs)
    expected = step(*other)
    cotangents = [torch.randn_like(x) for x in expected]
    for g, e in zip((*got, *us, *vs), (*expected, *other[0], *other[1]), strict=True):
        torch.testing.assert_close(g, e)
    unique = weights[:3]
    for g, e in zip(
        torch.autograd.grad(got, unique, cotangents),
        torch.autograd.grad(expected, unique, cotangents),
        strict=True,
    ):
        torch.testing.assert_close(g, e)


def test_a_fake_tensor_keeps_strides(layers):
    weight = torch.randn(8, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    fake = torch.ops.genkern.spectral_norm(
        [weight.to("meta")],
        [torch.ones(8, device="meta")],
        [torch.ones(48, device="meta")],
        [0],
        [1],
        1e-12,
        "u_first",
    )
    assert fake[0][0].stride() == weight.stride()
    assert fake[1].shape == (1,)
    assert fake[2].shape == (56,)
