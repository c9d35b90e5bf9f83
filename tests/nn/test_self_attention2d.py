"""SelfAttention2d against the formula of BigGAN, written out."""

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern.nn import SelfAttention2d


def written_out(block, x):
    theta, phi, g = (F.conv2d(x, getattr(block, name).weight) for name in ("theta", "phi", "g"))
    batch, _, height, width = x.shape
    phi, g = F.max_pool2d(phi, 2), F.max_pool2d(g, 2)
    theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
    beta = torch.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
    o = torch.bmm(g, beta.transpose(1, 2)).view(batch, -1, height, width)
    return x + block.gamma * F.conv2d(o, block.o.weight)


@pytest.fixture
def block():
    block = SelfAttention2d(16).double()
    torch.nn.init.constant_(block.gamma, 0.7)
    return block


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 16, 5, 7), (3, 16, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_is_the_formula(block, shape, memory_format):
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format)
    inputs = [x.requires_grad_(), *block.parameters()]
    with genkern.explain() as log:
        out = block(x)
    assert [choice.op for choice in log] == ["attention"]
    expected = written_out(block, x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_second_derivative():
    block = SelfAttention2d(8).double()
    torch.nn.init.constant_(block.gamma, 0.7)
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, x)


def test_starts_as_the_identity():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(SelfAttention2d(8)(x), x)


def test_has_the_names_of_biggan():
    names = {name: list(p.shape) for name, p in SelfAttention2d(32).named_parameters()}
    assert names == {
        "gamma": [],
        "theta.weight": [4, 32, 1, 1],
        "phi.weight": [4, 32, 1, 1],
        "g.weight": [16, 32, 1, 1],
        "o.weight": [32, 16, 1, 1],
    }


@pytest.mark.parametrize("channels", [0, -8, 12])
def test_bad_channels(channels):
    with pytest.raises(ValueError, match=f"channels must be a positive multiple of 8.*{channels}"):
        SelfAttention2d(channels)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 16, 4, 4), (2, 8, 1, 4)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match="x must be"):
        SelfAttention2d(8)(torch.zeros(shape))
