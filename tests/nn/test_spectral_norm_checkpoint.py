"""Activation checkpointing: what is repeated moves no vectors and uses the same weights.

torch's own parametrization moves u and v again in the repetition, and so differentiates at other
weights than those of the forward.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import genkern


class Block(nn.Module):
    """Reads its weight twice."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(5, 6), nn.Sequential(Block(6), Block(6), Block(6))
        self.last = nn.Linear(6, 1)

    def run_block(self, x):
        return self.block(x)

    def forward(self, x):
        return self.last(self.run_block(torch.tanh(self.first(x))))


def per_layer(model):
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        genkern.spectral_norm(layer)
    return model


def whole(model):
    return genkern.spectral_norm(model, recurse=True)


def inner(model):
    """The checkpointed block is the model that is normalised together."""
    genkern.spectral_norm(model.block, recurse=True)
    return model


NORMALIZE = {"per layer": per_layer, "whole": whole, "inner": inner}


@pytest.fixture(params=[False, True], ids=["saved", "reentrant"])
def use_reentrant(request):
    return request.param


def checkpointed(model, where, use_reentrant):
    """(a copy of the model, how to call it)"""
    model = copy.deepcopy(model)
    if where == "model":
        return model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)
    if where == "nested":
        middle = model.block[1]
        call = middle.forward
        middle.forward = lambda x: checkpoint(call, x, use_reentrant=use_reentrant)
        block = model.block
        model.run_block = lambda x: checkpoint(block, x, use_reentrant=use_reentrant)
    else:
        block = model.block
        model.run_block = lambda x: checkpoint(block, x, use_reentrant=use_reentrant)
    return model, model


def normalised(how):
    torch.manual_seed(2)
    return NORMALIZE[how](Net().double())


def inputs():
    return torch.randn(3, 5, dtype=torch.double, requires_grad=True)


def assert_same(model, other):
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["model", "block", "nested"])
@pytest.mark.parametrize("how", NORMALIZE)
@pytest.mark.parametrize("training", [True, False])
def test_one_forward(how, where, training, use_reentrant):
    model = normalised(how).train(training)
    other, call = checkpointed(model, where, use_reentrant)
    x = inputs()
    model(x).square().sum().backward()
    with genkern.explain() as log:
        call(x).square().sum().backward()
    assert {c.backend for c in log} == {"cpu"}
    assert_same(model, other)


@pytest.mark.parametrize("where", ["model", "block", "nested"])
@pytest.mark.parametrize("how", NORMALIZE)
@pytest.mark.parametrize("order", ["together", "first", "second first"])
def test_two_forwards_before_a_backward(how, where, order, use_reentrant):
    """Each repetition finds the weights of its own forward, in whatever order they come."""
    model = normalised(how)
    other, call = checkpointed(model, where, use_reentrant)
    real, fake = inputs(), inputs()
    for forward in (model, call):
        losses = [forward(x).square().sum() for x in (real, fake)]
        if order == "together":
            (losses[0] - 2 * losses[1]).backward()
        else:
            for loss in losses if order == "first" else reversed(losses):
                loss.backward()
    assert_same(model, other)


@pytest.mark.parametrize("how", NORMALIZE)
def test_a_graph_that_is_kept(how, use_reentrant):
    model = normalised(how)
    other, call = checkpointed(model, "block", use_reentrant)
    x = inputs()
    for forward in (model, call):
        loss = forward(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(model, other)


@pytest.mark.parametrize("where", ["model", "block"])
@pytest.mark.parametrize("how", NORMALIZE)
def test_the_mode_changes_before_the_backward(how, where, use_reentrant):
    model = normalised(how)
    other, call = checkpointed(model, where, use_reentrant)
    x = inputs()
    model(x).sum().backward()
    loss = call(x).sum()
    other.eval()
    loss.backward()
    assert_same(model, other)


@pytest.mark.parametrize("where", ["model", "block", "nested"])
@pytest.mark.parametrize("how", NORMALIZE)
def test_r1(how, where):
    """With use_reentrant=True torch refuses torch.autograd.grad itself."""
    model = normalised(how)
    other, call = checkpointed(model, where, use_reentrant=False)
    for forward in (model, call):
        x = torch.linspace(-1, 1, 15, dtype=torch.double).view(3, 5).requires_grad_()
        logits = forward(x)
        (genkern.losses.r1(logits, x, gamma=10) + logits.sum()).backward()
    assert_same(model, other)


def test_without_gradients_nothing_is_repeated(use_reentrant):
    model = normalised("per layer")
    other, call = checkpointed(model, "block", use_reentrant)
    x = inputs().detach()
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_someone_elses_repetition_moves_nothing():
    """A backward that calls the model, as other libraries' checkpointing does."""
    model = normalised("whole")

    class Repeated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return model(x)

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(model(x), x, grad)

    other = copy.deepcopy(model)
    x = inputs()
    Repeated.apply(x).sum().backward()
    got = x.grad.clone()
    x.grad = None
    other(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
