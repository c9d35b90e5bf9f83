"""torch's own spectral norms taken over in place, and given back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as legacy

import genkern
from genkern.nn.spectral_norm import SpectralNorm
from genkern.nn.spectral_norm.adoption import adopt, release


class Net(nn.Module):
    """Both of torch's forms, with options of every kind; a 1-D weight in each."""

    def __init__(self):
        super().__init__()
        new = parametrizations.spectral_norm
        self.embed = legacy(nn.Embedding(10, 6))
        self.conv = nn.Sequential(new(nn.Conv2d(3, 6, 3, padding=1), n_power_iterations=2))
        self.up = legacy(nn.ConvTranspose2d(6, 4, 2, stride=2), n_power_iterations=3, eps=1e-6)
        self.cell = new(new(nn.GRUCell(6, 4), "weight_hh", eps=1e-6), "weight_ih", dim=1)
        self.norms = nn.Sequential(new(nn.LayerNorm(4)), legacy(nn.LayerNorm(4)))
        self.last = nn.Linear(4, 1)

    def forward(self, x, y):
        picture = self.up(torch.relu(self.conv(x))).mean((2, 3))
        return self.last(self.norms(self.cell(self.embed(y), picture))).sum(1)


def batch():
    return torch.randn(4, 3, 6, 6, dtype=torch.double), torch.randint(0, 10, (4,))


@pytest.fixture
def twins():
    ours = Net().double()
    theirs = copy.deepcopy(ours)
    return ours, theirs


def train(model, inputs, optimizer, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append((model(*inputs) ** 2).mean())
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.02)


def test_names_and_forms(twins):
    ours, _ = twins
    found = adopt(ours)
    assert [(a.name, a.form, a.reason) for a in found] == [
        ("embed.weight", "legacy", None),
        ("conv.0.weight", "parametrized", None),
        ("up.weight", "legacy", None),
        ("cell.weight_hh", "parametrized", None),
        ("cell.weight_ih", "parametrized", None),
        ("norms.0.weight", "parametrized", None),
        ("norms.1.weight", "legacy", None),
    ]
    assert found[2].module is ours.up
    assert ours.up.parametrizations.weight[0].order == "v_first"
    assert "n_power_iterations=3, dim=1, eps=1e-06, order='v_first'" in repr(ours.up)
    assert adopt(ours) == []


@pytest.mark.parametrize("training", [True, False])
def test_adopting_changes_no_output_no_gradient_and_no_vector(twins, training):
    """Over three steps of one optimizer that was made before the adoption."""
    ours, theirs = twins
    inputs = batch()
    optimizers = [adam(model) for model in twins]
    train(ours, inputs, optimizers[0]), train(theirs, inputs, optimizers[1])
    ours.train(training), theirs.train(training)
    before = [id(p) for p in ours.parameters()], {id(b) for b in ours.buffers()}
    adopt(ours)
    assert before == ([id(p) for p in ours.parameters()], {id(b) for b in ours.buffers()})
    got, expected = (
        train(model, inputs, optimizer) for model, optimizer in zip(twins, optimizers, strict=True)
    )
    torch.testing.assert_close(got, expected)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert torch.equal(ours.up.parametrizations.weight[0]._u, theirs.up.weight_u) != training
    torch.testing.assert_close(ours.up.parametrizations.weight[0]._u, theirs.up.weight_u)


def test_one_call_per_eps_and_order(twins):
    ours, _ = twins
    adopt(ours)
    with genkern.explain() as log:
        ours(*batch())
    assert [(c.op, c.backend) for c in log] == [("spectral_norm", "cpu")] * 4


@pytest.mark.parametrize("how", ["at once", "after training", "of a copy"])
def test_release(twins, how):
    """torch's forms again: training goes on as it would have done."""
    ours, theirs = twins
    inputs = batch()
    found = adopt(ours)
    if how == "of a copy":
        kept = ours
        ours = copy.deepcopy(ours)
        found = [a._replace(module=ours.get_submodule(a.name.rpartition(".")[0])) for a in found]
    optimizers = [adam(ours), adam(theirs)]
    if how == "after training":
        train(ours, inputs, optimizers[0]), train(theirs, inputs, optimizers[1])
    release(ours, found)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert not any(isinstance(m, SpectralNorm) for m in ours.modules())
    layer = ours.embed
    sigma = layer.weight_u @ layer.weight_orig @ layer.weight_v
    torch.testing.assert_close(layer.weight, (layer.weight_orig / sigma).detach())
    assert not ours._forward_pre_hooks and not ours._forward_hooks
    with genkern.explain() as log:
        got = train(ours, inputs, optimizers[0])
    torch.testing.assert_close(got, train(theirs, inputs, optimizers[1]))
    assert not log
    theirs.load_state_dict(ours.state_dict())
    remove_spectral_norm(ours.embed), parametrize.remove_parametrizations(ours.cell, "weight_hh")
    if how == "of a copy":
        with genkern.explain() as log:
            kept(*inputs).sum().backward()
        assert {c.backend for c in log} == {"cpu"}


def test_a_copy_made_before_stays_torchs(twins):
    """torch gives copies the same class as the module that they were made from."""
    ours, theirs = twins
    found = adopt(ours)
    with genkern.explain() as log:
        theirs(*batch())
    assert not log
    release(ours, found)
    theirs.cell.weight_hh  # noqa: B018


def test_release_skips_what_was_removed(twins):
    ours, _ = twins
    found = adopt(ours)
    parametrize.remove_parametrizations(ours.up, "weight")
    release(ours, found)
    assert type(ours.up) is nn.ConvTranspose2d
    assert not ours._forward_pre_hooks


def test_release_refuses_a_legacy_weight_with_more_parametrizations(twins):
    ours, _ = twins
    found = adopt(ours)
    parametrize.register_parametrization(ours.up, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"up\.weight has another parametrization"):
        release(ours, found)
    assert isinstance(ours.conv[0].parametrizations.weight[0], SpectralNorm)


def stacked(layer):
    parametrizations.spectral_norm(layer)
    return parametrize.register_parametrization(layer, "weight", nn.Identity())


def computed(layer):
    legacy(layer)
    return parametrize.register_parametrization(layer, "weight_orig", nn.Identity())


def derived(layer):
    class Mine(parametrizations._SpectralNorm):
        pass

    return parametrize.register_parametrization(layer, "weight", Mine(layer.weight))


def mixed(layer):
    layer = legacy(layer)
    layer.weight_u = layer.weight_u.double()
    return layer


def reclassed(layer):
    layer = parametrizations.spectral_norm(layer)
    layer.__class__ = type("Sharded", (type(layer),), {})
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: stacked(nn.Linear(3, 3)), "other parametrizations"),
        (lambda: computed(nn.Linear(3, 3)), "made by something else"),
        (lambda: derived(nn.Linear(3, 3)), "Mine is a class derived from"),
        (lambda: mixed(nn.Linear(3, 3)), "its weight is torch.float32, and its u or v is not"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.cfloat)), "complex64"),
        (lambda: legacy(nn.Linear(3, 3)).to("meta"), "on meta, not a plain"),
        (lambda: reclassed(nn.Linear(3, 3)), "layer's class to Sharded"),
    ],
    ids=["stacked", "computed", "derived", "mixed", "complex", "meta", "class"],
)
def test_what_is_left_and_why(make, reason):
    model = nn.Sequential(make(), legacy(nn.Linear(3, 3)))
    before = list(model[0].state_dict())
    left, taken = adopt(model)
    assert left.name == "0.weight" and reason in left.reason
    assert taken.reason is None
    assert list(model[0].state_dict()) == before
    release(model, [left, taken])
    assert hasattr(model[1], "weight_orig")
