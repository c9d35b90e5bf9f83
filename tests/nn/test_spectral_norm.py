"""genkern.spectral_norm on one layer: a drop-in for torch's parametrization."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as legacy

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
    options.pop("order", None)
    theirs(other, **options)
    return ours, other


def assert_same_state(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        torch.testing.assert_close(
            value, b.state_dict()[key], equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


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


# ---- torch's legacy order -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3, "eps": 1e-4}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_v_first_is_the_legacy_order(name, options):
    ours, theirs = twin(LAYERS[name], theirs=legacy, order="v_first", **options)
    normalization = ours.parametrizations.weight[0]
    inputs = {"embedding": (torch.tensor([0]),), "bilinear": (torch.ones(1, 3), torch.ones(1, 4))}
    theirs.weight_u.copy_(normalization._u), theirs.weight_v.copy_(normalization._v)
    hook = next(iter(theirs._forward_pre_hooks.values()))
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        hook(theirs, inputs.get(name))
        a, b = ours.weight, theirs.weight
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(normalization._u, theirs.weight_u)
        torch.testing.assert_close(normalization._v, theirs.weight_v)
        for weight in (a, b):
            weight.pow(3).sum().backward()
        torch.testing.assert_close(
            ours.parametrizations.weight.original.grad, theirs.weight_orig.grad
        )


# ---- Unusual weights ----------------------------------------------------------------------------

SPECIAL = {
    "zero": lambda w: torch.zeros_like(w),
    "rank one": lambda w: torch.outer(w[:, 0], w[0]),
    "one row": lambda w: w * torch.eye(len(w), 1),
    "huge": lambda w: w * 1e18,
    "tiny": lambda w: w * 1e-18,
    "denormal": lambda w: w * 1e-41,
    "NaN": lambda w: torch.where(torch.eye(*w.shape, dtype=torch.bool), float("nan"), w),
    "Inf": lambda w: torch.where(torch.eye(*w.shape, dtype=torch.bool), float("inf"), w),
}


def read_once(layer):
    """Its weight in a forward of the whole model, where it is normalised as one; else as it is."""
    hooks = layer._forward_pre_hooks
    if not hooks:
        return layer.weight
    read = []
    handle = layer.register_forward_pre_hook(lambda m, args: read.append(m.weight))
    layer(torch.zeros(1, 5))
    handle.remove()
    return read[0]


@pytest.mark.parametrize("recurse", [False, True])
@pytest.mark.parametrize("what", SPECIAL)
def test_special_weights_as_torch(what, recurse):
    """Over two steps in training and one in eval mode; weights, gradients, u and v."""
    torch.manual_seed(1)
    ours, theirs = nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False)
    for layer, normalize in (
        (ours, lambda m: genkern.spectral_norm(m, recurse=recurse)),
        (theirs, parametrizations.spectral_norm),
    ):
        torch.manual_seed(2)
        normalize(layer)
    original = SPECIAL[what](torch.randn(7, 5))
    for layer in (ours, theirs):
        layer.parametrizations.weight.original.data.copy_(original)
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        a, b = read_once(ours), theirs.weight
        torch.testing.assert_close(a, b, equal_nan=True)
        assert_same_state(ours, theirs)
        gradients = [
            torch.autograd.grad(weight, layer.parametrizations.weight.original, original.sign())
            for weight, layer in ((a, ours), (b, theirs))
        ]
        torch.testing.assert_close(*gradients, equal_nan=True)


def test_a_norm_that_overflows_in_fp32():
    """torch's is inf, and so its weight; here it is what fp64 gives."""
    layer = genkern.spectral_norm(nn.Linear(5, 7, bias=False))
    exact = copy.deepcopy(layer).double()
    for one in (layer, exact):
        one.parametrizations.weight.original.data.mul_(1e25)
    torch.testing.assert_close(layer.weight, exact.weight.float())


class Complex(nn.Linear):
    def double(self):
        return self.to(torch.cdouble)


def test_complex_weights_as_torch():
    ours, theirs = twin(lambda: Complex(5, 7))
    x = torch.randn(2, 5, dtype=torch.cdouble)
    with genkern.explain() as log:
        torch.testing.assert_close(ours(x), theirs(x))
    assert [(c.backend, c.reason) for c in log] == [
        ("reference", "complex weights: plain torch operations")
    ]
    assert_same_state(ours, theirs)
    for layer in (ours, theirs):
        layer(x).abs().sum().backward()
    torch.testing.assert_close(
        ours.parametrizations.weight.original.grad, theirs.parametrizations.weight.original.grad
    )


def test_twice_on_one_weight_and_on_two():
    layer = nn.Linear(5, 7).double()
    for name in ("weight", "weight", "bias"):
        genkern.spectral_norm(layer, name)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(layer.weight, 2).item(), 1.0, rtol=0.05, atol=0
    )
    torch.testing.assert_close(layer.bias.norm().item(), 1.0)
    parametrize.remove_parametrizations(layer, "bias")
    assert not parametrize.is_parametrized(layer, "bias")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


def test_batched_gradients():
    layer = genkern.spectral_norm(nn.Linear(3, 4)).eval()
    original = layer.parametrizations.weight.original
    batch = torch.randn(2, 4, 3)
    with genkern.explain() as log:
        weight = layer.weight
        (got,) = torch.autograd.grad(weight, original, batch, True, is_grads_batched=True)
    assert [c.backend for c in log] == ["cpu", "reference"]
    each = [torch.autograd.grad(weight, original, grad, True)[0] for grad in batch]
    torch.testing.assert_close(got, torch.stack(each))


def test_gradcheck_of_a_layer():
    layer = genkern.spectral_norm(nn.Linear(2, 3)).double().eval()
    x = torch.randn(2, 2, dtype=torch.double, requires_grad=True)

    def run(x, original):
        with torch.nn.utils.stateless._reparametrize_module(
            layer, {"parametrizations.weight.original": original}
        ):
            return layer(x)

    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    torch.autograd.gradcheck(run, (x, weight))
    torch.autograd.gradgradcheck(run, (x, weight))


def test_assigning_a_weight():
    """As to torch's: what is assigned is the weight that is normalised."""
    layer = genkern.spectral_norm(nn.Linear(3, 3, bias=False)).eval()
    layer.weight = 2 * torch.eye(3)
    assert torch.equal(layer.parametrizations.weight.original, 2 * torch.eye(3))


def test_channels_last_is_kept():
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    genkern.spectral_norm(layer)
    weight = layer.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    weight.sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient.is_contiguous(memory_format=torch.channels_last)
