"""SelfAttention2d against the formula of BigGAN, written out."""

import copy

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern.nn import SelfAttention2d
from genkern.nn.self_attention2d import CONVOLUTIONS


def written_out(block, x):
    weights = {name: getattr(block, name).weight for name in CONVOLUTIONS}
    return formula(x, weights, block.gamma)


def formula(x, weights, gamma):
    theta, phi, g = (F.conv2d(x, weights[name]) for name in ("theta", "phi", "g"))
    batch, _, height, width = x.shape
    phi, g = F.max_pool2d(phi, 2), F.max_pool2d(g, 2)
    theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
    beta = torch.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
    o = torch.bmm(g, beta.transpose(1, 2)).view(batch, -1, height, width)
    return x + gamma * F.conv2d(o, weights["o"])


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
    assert [(choice.op, choice.backend) for choice in log] == [("attention", "cpu")]
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


def test_r1_is_the_formulas(block):
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64, requires_grad=True)
    penalties = []
    with genkern.explain() as log:
        for forward in (block, lambda x: written_out(block, x)):
            (slope,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad((slope**2).sum(), list(block.parameters())))
    torch.testing.assert_close(*penalties, rtol=1e-9, atol=1e-10)
    assert ("attention.second", "cpu") in [(choice.op, choice.backend) for choice in log]


def test_compiled(block):
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    results = [forward(x) for forward in (torch.compile(block, fullgraph=True), block)]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in results]
    torch.testing.assert_close(*grads)


def test_starts_as_the_identity():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(SelfAttention2d(8)(x), x)


def test_has_the_names_of_biggan():
    names = {name: list(p.shape) for name, p in SelfAttention2d(32).named_parameters()}
    assert names == {
        "gamma": [1],
        "theta.weight": [4, 32, 1, 1],
        "phi.weight": [4, 32, 1, 1],
        "g.weight": [16, 32, 1, 1],
        "o.weight": [32, 16, 1, 1],
    }


# ---- BigGAN-PyTorch's blocks and weights --------------------------------------------------------


class BigGANConv2d(torch.nn.Conv2d):
    """The normalised convolution of BigGAN-PyTorch, in eval mode: one power step, not kept."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def normalised(self):
        matrix = self.weight.flatten(1)
        v = F.normalize(self.u0 @ matrix)
        u = F.normalize(v @ matrix.mT)
        return self.weight / (v @ matrix.mT @ u.mT).squeeze()

    def forward(self, x):
        return F.conv2d(x, self.normalised())


def normalised_biggan(channels=16):
    block = SelfAttention2d(channels, BigGANConv2d).double().eval()
    torch.nn.init.constant_(block.gamma, 0.7)
    return block


def test_takes_the_place_of_biggans():
    """Called as BigGAN-PyTorch calls its own: with its convolution, and with a class condition."""
    block = normalised_biggan()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    weights = {name: getattr(block, name).normalised() for name in CONVOLUTIONS}
    torch.testing.assert_close(block(x, torch.zeros(2, 3)), formula(x, weights, block.gamma))
    assert {"theta.u0", "theta.sv0", "theta.weight"} <= set(block.state_dict())


def test_biggans_plain_weights_go_both_ways(block):
    """BigGAN's gamma has no dimension; torch itself makes a scalar of one element."""
    weights = {**block.state_dict(), "gamma": block.gamma.detach().squeeze()}
    other = SelfAttention2d(16).double()
    other.load_state_dict(weights, strict=True)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(other(x), block(x))
    theirs = SelfAttention2d(16).double()
    theirs.gamma = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    theirs.load_state_dict(block.state_dict(), strict=True)
    assert torch.equal(theirs.gamma, block.gamma.squeeze())


@pytest.mark.parametrize("inside", [False, True])
def test_loads_biggans_normalised_weights(inside):
    source = normalised_biggan()
    model = torch.nn.Sequential(SelfAttention2d(16)) if inside else SelfAttention2d(16)
    model = copy.deepcopy(genkern.spectral_norm(model.double(), recurse=True)).eval()
    state = {f"0.{key}" if inside else key: x for key, x in source.state_dict().items()}
    before = dict(state)
    model.load_state_dict(state, strict=True)
    assert state.keys() == before.keys()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), source(x), rtol=1e-12, atol=1e-12)
    model.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_says_that_biggans_weights_were_normalised(block, strict):
    with pytest.raises(RuntimeError, match=r"theta\.u0 .* call genkern\.spectral_norm"):
        block.load_state_dict(normalised_biggan().state_dict(), strict=strict)


# ---- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [0, -8, 12])
def test_bad_channels(channels):
    with pytest.raises(ValueError, match=f"channels must be a positive multiple of 8.*{channels}"):
        SelfAttention2d(channels)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 16, 4, 4), (2, 8, 1, 4)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match="x must be"):
        SelfAttention2d(8)(torch.zeros(shape))
