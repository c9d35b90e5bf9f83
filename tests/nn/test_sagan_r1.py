"""A SAGAN trained with R1 on real digits: the losses of genkern's kernels are eager PyTorch's."""

import pytest
import torch

import genkern
from genkern.nn import SelfAttention2d
from genkern.train import GANTrainer
from genkern.train.models import Discriminator, Generator

STEPS = 30


@pytest.fixture
def one_thread():
    """These images are small: on a busy machine a second thread is mostly waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def softmax_attention(q, k, v, *, scale):
    return torch.softmax(scale * (q @ k.mT), -1) @ v


def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's")
    data = datasets.load_digits()
    images = torch.from_numpy(data.images)[:, None] / 8 - 1
    labels = torch.from_numpy(data.target)
    return [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 8 * STEPS, 8)]


def curve():
    """[STEPS, 3]: the losses of G and D and the penalty; and what ran."""
    torch.manual_seed(0)
    generator = Generator(8, 10, width=8, z_dim=8).double()
    discriminator = Discriminator(8, 10, width=8, dtype=torch.float64)
    gates = [
        module.gamma
        for model in (generator, discriminator)
        for module in model.modules()
        if isinstance(module, SelfAttention2d)
    ]
    assert len(gates) == 2
    for gate in gates:
        torch.nn.init.constant_(gate, 0.5)  # at 0, as they start, there is no attention to compare
    trainer = GANTrainer(generator, discriminator, loss="hinge", r1=1.0)
    with genkern.explain() as log:
        steps = [trainer.step(*batch)[:3] for batch in digits()]
    assert all((gate - 0.5).abs() > 1e-3 for gate in gates)
    ran = [(c.op, c.backend) for c in log if c.op.startswith("attention")]
    return torch.tensor(steps), ran


def test_the_loss_curve_is_eagers(monkeypatch, one_thread):
    kernels, ran = curve()
    assert ran.count(("attention.second", "cpu")) == STEPS
    assert {backend for _, backend in ran} == {"cpu"}

    with genkern.use_backend("reference"):
        reference, ran = curve()
    assert {backend for _, backend in ran} == {"reference"}

    monkeypatch.setattr(genkern, "attention", softmax_attention)
    with genkern.use_backend("reference"):
        eager, ran = curve()
    assert ran == []

    assert kernels.isfinite().all() and (kernels[:, 2] > 0).all()
    torch.testing.assert_close(kernels, eager, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(reference, eager, rtol=1e-11, atol=1e-11)
