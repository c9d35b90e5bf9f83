"""Checkpoints of the three forms, loaded and converted: the weights that a model then uses."""

import copy
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy

import genkern
from genkern.nn import convert_spectral_norm


class BigGANNorm:
    """BigGAN-PyTorch's normalised layers: one power step at each use, kept in training."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("u0", torch.randn(1, self.weight.shape[0]))
        self.register_buffer("sv0", torch.ones(1))

    def used_weight(self):
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix, eps=1e-12)
            u = F.normalize(v @ matrix.mT, eps=1e-12)
        sigma = (v @ matrix.mT @ u.mT).squeeze()
        if self.training:
            self.u0.copy_(u)
            self.sv0.copy_(sigma.detach())
        return self.weight / sigma


class BigGANLinear(BigGANNorm, nn.Linear):
    def forward(self, x):
        return F.linear(x, self.used_weight(), self.bias)


class BigGANConv2d(BigGANNorm, nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.used_weight(), self.bias)


class BigGANEmbedding(BigGANNorm, nn.Embedding):
    def forward(self, x):
        return F.embedding(x, self.used_weight())


PLAIN = {"linear": nn.Linear, "conv": nn.Conv2d, "embed": nn.Embedding}
BIGGAN = {"linear": BigGANLinear, "conv": BigGANConv2d, "embed": BigGANEmbedding}


class Net(nn.Module):
    def __init__(self, layers=PLAIN, normalize=lambda layer: layer):
        super().__init__()
        self.body = nn.Sequential(normalize(layers["conv"](3, 5, 2)), nn.BatchNorm2d(5))
        self.embed = normalize(layers["embed"](7, 5))
        self.last = normalize(layers["linear"](5, 2))

    def forward(self, x, y):
        return self.last(self.body(x).mean((2, 3)) + self.embed(y))


MAKERS = {
    "genkern": lambda: genkern.spectral_norm(Net(), recurse=True),
    "parametrized": lambda: Net(normalize=parametrizations.spectral_norm),
    "legacy": lambda: Net(normalize=legacy),
    "biggan": lambda: Net(BIGGAN),
}


def trained(form, steps=3):
    """After some forwards in training mode, then in eval mode; with its inputs."""
    torch.manual_seed(sorted(MAKERS).index(form))
    model = MAKERS[form]().double()
    inputs = torch.randn(4, 3, 5, 5, dtype=torch.double), torch.randint(0, 7, (4,))
    for _ in range(steps):
        model(*inputs)
    return model.eval(), inputs


@pytest.mark.parametrize("source", MAKERS)
def test_every_form_loads_into_ours(source):
    model, inputs = trained(source)
    state = model.state_dict()
    before = dict(state)
    ours = MAKERS["genkern"]().double().eval()
    ours.load_state_dict(state, strict=True)
    torch.testing.assert_close(ours(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)
    assert state.keys() == before.keys()
    assert all(state[key] is before[key] for key in state)


@pytest.mark.parametrize(("source", "target"), [*permutations(MAKERS, 2)])
def test_every_form_is_converted_into_every_other(source, target):
    """To BigGAN's form where the power method has converged: it takes one step more."""
    model, inputs = trained(source, steps=60 if target == "biggan" else 3)
    state = model.state_dict()
    form = "parametrized" if target == "genkern" else target
    converted = convert_spectral_norm(state, form)
    other = MAKERS[target]().double().eval()
    other.load_state_dict(converted, strict=True)
    exact = 1e-12 if target != "biggan" else 1e-3
    torch.testing.assert_close(other(*inputs), model(*inputs), rtol=exact, atol=exact)
    assert state.keys() == model.state_dict().keys()
    assert convert_spectral_norm(converted, form) == converted


def test_one_step_of_biggan_is_the_step_that_it_takes():
    """u0 given to BigGAN as our u: its weights are ours after one more step, v first."""
    model, inputs = trained("legacy")
    other = MAKERS["biggan"]().double().eval()
    other.load_state_dict(convert_spectral_norm(model.state_dict(), "biggan"))
    model.train()
    model.body[1].eval()
    expected = model(*inputs)
    torch.testing.assert_close(other(*inputs), expected, rtol=1e-12, atol=1e-12)


def test_sv0_is_sigma():
    layer = genkern.spectral_norm(nn.Linear(4, 3)).eval()
    state = convert_spectral_norm(layer.state_dict(), "biggan")
    torch.testing.assert_close(state["weight"] / state["sv0"], layer.weight)
    assert list(state) == ["bias", "weight", "u0", "sv0"]


def test_training_goes_on_as_in_the_legacy_model():
    model, inputs = trained("legacy")
    ours = genkern.spectral_norm(Net(), recurse=True, order="v_first").double()
    ours.load_state_dict(model.state_dict())
    model.train()
    for _ in range(3):
        torch.testing.assert_close(ours(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.last.parametrizations.weight[0]._u, model.last.weight_u)


@pytest.mark.parametrize("order", ["u_first", "v_first"])
@pytest.mark.parametrize("theirs", [parametrizations.spectral_norm, legacy])
def test_one_dimension(order, theirs):
    source = theirs(nn.LayerNorm(5))
    nn.init.normal_(source.bias)
    source(torch.randn(2, 5))
    ours = genkern.spectral_norm(nn.LayerNorm(5), order=order).eval()
    ours.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), source.eval()(x))
    other = parametrizations.spectral_norm(nn.LayerNorm(5)).eval()
    other.load_state_dict(convert_spectral_norm(source.state_dict(), "parametrized"))
    torch.testing.assert_close(other(x), source(x))


def test_a_transposed_convolution_of_the_legacy_form():
    source = legacy(nn.ConvTranspose2d(3, 4, 2)).eval()
    ours = genkern.spectral_norm(nn.ConvTranspose2d(3, 4, 2)).eval()
    ours.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ours(x), source(x))
    with pytest.raises(ValueError, match=r"takes dimension 0 as the rows, and weight of shape"):
        convert_spectral_norm(source.state_dict(), "biggan")


def test_other_names_and_copies():
    """A recurrent cell with two normalised weights, its copy, and its legacy twin."""
    cell, twin = nn.GRUCell(3, 4), nn.GRUCell(3, 4)
    for name in ("weight_hh", "weight_ih"):
        genkern.spectral_norm(cell, name)
        legacy(twin, name)
    twin.eval()
    inputs = torch.randn(2, 3), torch.randn(2, 4)
    for ours in (copy.deepcopy(cell).eval(), cell.eval()):
        ours.load_state_dict(twin.state_dict(), strict=True)
        torch.testing.assert_close(ours(*inputs), twin(*inputs))
    with pytest.raises(ValueError, match="tensors named 'weight' only, not weight_hh"):
        convert_spectral_norm(cell.state_dict(), "biggan")


def test_what_is_no_spectral_norm_stays():
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    state["0.gain_u"] = torch.zeros(1)
    converted = convert_spectral_norm(state, "legacy")
    assert list(converted) == list(state)
    assert converted._metadata == state._metadata


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_were_not_normalised(strict):
    ours = MAKERS["genkern"]()
    plain = Net().state_dict()
    if strict:
        with pytest.raises(RuntimeError, match="Missing key"):
            ours.load_state_dict(plain)
    else:
        missing, unexpected = ours.load_state_dict(plain, strict=False)
        assert "last.weight" in unexpected
        assert "last.parametrizations.weight.original" in missing


def test_errors():
    state = MAKERS["biggan"]().state_dict()
    with pytest.raises(ValueError, match="'parametrized', 'legacy' or 'biggan', not 'torch'"):
        convert_spectral_norm(state, "torch")
    state["last.u1"] = state["last.u0"]
    with pytest.raises(ValueError, match=r"last\.u1 is there"):
        convert_spectral_norm(state, "legacy")
