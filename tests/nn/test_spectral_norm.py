"""genkern.spectral_norm on one layer: a drop-in for torch's parametrization."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import genkern

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(9, 4),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "1-D": lambda: nn.LayerNorm(6),
}


def twin(make, theirs=parametrizations.spectral_norm, **options):
    """The same layer with the same random start, normalised by genkern and by torch."""
    torch.manual_seed(3)
    ours = make().double()
    other = copy.deepcopy(ours)
    torch.manual_seed(5)
    genkern.spectral_norm(ours, **options)
    torch.manual_seed(5)
    theirs(other, **options)
    return ours, other


def assert_same_state(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[key], msg=lambda m, k=key: f"{k}: {m}")


# ---- One layer, as torch's ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"n_power_iterations": 3, "eps": 1e-4}, {"dim": -1}], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_as_torch(name, options):
    ours, theirs = twin(LAYERS[name], **options)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        a, b = ours.weight, theirs.weight
        torch.testing.assert_close(a, b)
        assert_same_state(ours, theirs)
        for weight in (a, b):
            weight.pow(3).sum().backward()
        torch.testing.assert_close(
            ours.parametrizations.weight.original.grad,
            theirs.parametrizations.weight.original.grad,
        )


def test_state_dicts_load_into_each_other():
    ours, theirs = twin(LAYERS["conv2d"])
    fresh, other = twin(LAYERS["conv2d"])
    ours.weight, theirs.weight  # noqa: B018
    fresh.load_state_dict(theirs.state_dict())
    other.load_state_dict(ours.state_dict())
    for layer in (fresh, other, ours, theirs):
        layer.eval()
    torch.testing.assert_close(fresh.weight, theirs.weight)
    torch.testing.assert_close(other.weight, ours.weight)


def test_other_name_and_removal():
    cell = genkern.spectral_norm(nn.GRUCell(3, 4), "weight_hh")
    assert parametrize.is_parametrized(cell, "weight_hh")
    cell.eval()
    expected = cell.weight_hh.detach().clone()
    parametrize.remove_parametrizations(cell, "weight_hh")
    assert type(cell) is nn.GRUCell
    assert torch.equal(cell.weight_hh, expected)


def test_sigma_in_fp32_under_autocast():
    layer = genkern.spectral_norm(nn.Linear(64, 64)).eval()
    expected = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: genkern.spectral_norm(torch.ones(3, 3)), TypeError, "must be an nn.Module"),
        (
            lambda: genkern.spectral_norm(nn.ReLU()),
            ValueError,
            "parameter or buffer named 'weight'",
        ),
        (
            lambda: genkern.spectral_norm(nn.Linear(3, 3), n_power_iterations=0),
            ValueError,
            "positive",
        ),
        (lambda: genkern.spectral_norm(nn.Linear(3, 3), dim=2), IndexError, "dim must be in"),
        (lambda: genkern.spectral_norm(nn.LazyLinear(3)), ValueError, "lazy"),
        (lambda: genkern.spectral_norm(nn.ReLU(), recurse=True), ValueError, "has no Linear"),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
