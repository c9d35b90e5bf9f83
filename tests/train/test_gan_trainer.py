"""GANTrainer with its own models and with a user's; genkern's kernels against eager PyTorch."""

import copy

import pytest
import torch
from torch import nn

import genkern
from genkern import losses
from genkern.losses.adversarial import NAMES
from genkern.train import GANTrainer, averaged
from genkern.train.models import Discriminator, Generator

STEPS = 20


def make_trainer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    generator = Generator(8, 10, width=8, z_dim=8).to(dtype)
    discriminator = Discriminator(8, 10, width=8, dtype=dtype)
    return GANTrainer(generator, discriminator, **options)


def batches(dtype, count=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
        yield images.to(dtype), torch.randint(10, (8,), generator=generator)


def train(trainer, dtype):
    torch.manual_seed(2)
    return torch.stack([torch.stack(trainer.step(*batch)[:2]) for batch in batches(dtype)])


@pytest.mark.parametrize("r1", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_backends_train_alike(dtype, within, r1):
    """The losses of the first steps, of eager PyTorch and of the kernels."""
    results = {}
    for backend in ("reference", "cpu"):
        with genkern.use_backend(backend), genkern.explain() as log:
            results[backend] = train(make_trainer(dtype, r1=r1), dtype)
        for op in ("attention", "spectral_norm", "adversarial_loss"):
            ran = {choice.backend for choice in log if choice.op == op}
            ran_backward = {choice.backend for choice in log if choice.op == op + ".backward"}
            assert ran == {backend}
            # R1 differentiates the gradients of D: those are plain PyTorch's.
            assert backend in ran_backward and ran_backward <= {backend, "reference"}
    losses_of = {name: result.double() for name, result in results.items()}
    difference = (losses_of["cpu"] - losses_of["reference"]).abs()
    assert (difference <= within * (1 + losses_of["reference"].abs())).all()


class TinyG(nn.Module):
    """A user's: no labels, no z_dim, and a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, z, labels):
        assert labels is None
        return self.norm(self.linear(z))


class TinyD(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(2, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 1)
        self.batches = []

    def forward(self, x, labels):
        self.batches.append(len(x))
        return self.linear(torch.tanh(self.frozen(x)))


def test_a_users_models():
    G, D = TinyG(), TinyD()
    before = copy.deepcopy(D.state_dict())
    trainer = GANTrainer(G, D, z_dim=3)
    step = trainer.step(torch.randn(4, 2))
    assert D.batches == [8, 4]
    assert torch.equal(D.frozen.weight, before["frozen.weight"])
    assert not torch.equal(D.linear.weight, before["linear.weight"])
    assert all(value.dim() == 0 and not value.requires_grad for value in step)
    assert trainer.noise(5).shape == (5, 3)


def test_one_step_written_out():
    """The same updates as a loop by hand, with plain hinge losses and Adam."""
    G, D = TinyG().double(), TinyD().double()
    real = torch.randn(4, 2, dtype=torch.float64)
    by_hand_G, by_hand_D = copy.deepcopy(G), copy.deepcopy(D)
    torch.manual_seed(5)
    step = GANTrainer(G, D, z_dim=3, r1=2.0).step(real)

    torch.manual_seed(5)
    opt_G = torch.optim.Adam(by_hand_G.parameters(), 1e-3, (0.0, 0.9), 1e-6)
    opt_D = torch.optim.Adam(by_hand_D.linear.parameters(), 2e-3, (0.0, 0.9), 1e-6)
    fake = by_hand_G(torch.randn(4, 3, dtype=torch.float64), None).detach()
    real.requires_grad_()
    r, f = by_hand_D(real, None), by_hand_D(fake, None)
    (slope,) = torch.autograd.grad(r.sum(), real, create_graph=True)
    penalty = 2.0 / 2 * slope.square().sum(1).mean()
    loss_d = torch.relu(1 - r).mean() + torch.relu(1 + f).mean()
    (loss_d + penalty).backward()
    opt_D.step()
    loss_g = -by_hand_D(by_hand_G(torch.randn(4, 3, dtype=torch.float64), None), None).mean()
    opt_G.zero_grad()
    loss_g.backward()
    opt_G.step()

    torch.testing.assert_close(step.loss_d, loss_d.detach())
    torch.testing.assert_close(step.penalty, penalty.detach())
    torch.testing.assert_close(step.loss_g, loss_g.detach())
    torch.testing.assert_close(D.state_dict(), by_hand_D.state_dict())
    torch.testing.assert_close(G.state_dict(), by_hand_G.state_dict())


def test_lazy_r1_written_out():
    """Every third step a step of its own on 3 times the penalty; lr and betas scaled."""
    G, D = TinyG().double(), TinyD().double()
    batches = torch.randn(5, 4, 2, dtype=torch.float64)
    by_hand_G, by_hand_D = copy.deepcopy(G), copy.deepcopy(D)
    torch.manual_seed(5)
    trainer = GANTrainer(G, D, z_dim=3, r1=2.0, r1_every=3, betas=(0.5, 0.9))
    steps = [trainer.step(real) for real in batches]

    torch.manual_seed(5)
    opt_G = torch.optim.Adam(by_hand_G.parameters(), 1e-3, (0.5, 0.9), 1e-6)
    c = 3 / 4
    opt_D = torch.optim.Adam(by_hand_D.linear.parameters(), 2e-3 * c, (0.5**c, 0.9**c), 1e-6)
    for i, real in enumerate(batches):
        fake = by_hand_G(torch.randn(4, 3, dtype=torch.float64), None).detach()
        r, f = by_hand_D(torch.cat([real, fake]), None).chunk(2)
        opt_D.zero_grad()
        (torch.relu(1 - r).mean() + torch.relu(1 + f).mean()).backward()
        opt_D.step()
        penalty = torch.zeros(())
        if i % 3 == 0:
            x = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(by_hand_D(x, None).sum(), x, create_graph=True)
            penalty = 2.0 / 2 * slope.square().sum(1).mean()
            opt_D.zero_grad()
            (3 * penalty).backward()
            opt_D.step()
        loss_g = -by_hand_D(by_hand_G(torch.randn(4, 3, dtype=torch.float64), None), None).mean()
        opt_G.zero_grad()
        loss_g.backward()
        opt_G.step()
        torch.testing.assert_close(steps[i].penalty, penalty.detach().double())
    torch.testing.assert_close(D.state_dict(), by_hand_D.state_dict())
    torch.testing.assert_close(G.state_dict(), by_hand_G.state_dict())


@pytest.mark.parametrize("loss", [*NAMES, losses.hinge])
def test_every_loss_trains(loss):
    trainer = GANTrainer(TinyG(), TinyD(), loss=loss, z_dim=3)
    for _ in range(3):
        assert all(value.isfinite() for value in trainer.step(torch.randn(4, 2)))


def test_average_follows_and_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    average = averaged(model, 0.9)
    kept = model.weight.detach().clone()
    for n in range(4):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2))
            model.running_mean.copy_(torch.randn(2))
        average.update_parameters(model)
        # torch's AveragedModel takes the first update as it is.
        decay = 0.0 if n == 0 else min(0.9, (1 + n) / (10 + n))
        kept = decay * kept + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.module.weight, kept)
        assert torch.equal(average.module.running_mean, model.running_mean)
    assert not average.training and not average.module.weight.requires_grad


def test_unit_vectors_of_spectral_norm_stay_unit():
    model = genkern.spectral_norm(nn.Linear(6, 5))
    average = averaged(model, 0.999)
    for _ in range(50):
        model(torch.randn(2, 6))
        with torch.no_grad():
            model.parametrizations.weight.original.add_(torch.randn(5, 6))
        average.update_parameters(model)
    u = average.module.parametrizations.weight[0]._u
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "z_dim must be given"),
        ({"z_dim": 3, "r1": -1.0}, "r1 must be 0 or positive, not -1.0"),
        ({"z_dim": 3, "r1": float("nan")}, "r1 must be 0 or positive, not nan"),
        ({"z_dim": 3, "r1_every": 0}, "r1_every must be at least 1, not 0"),
        ({"z_dim": 3, "ema": 1.0}, r"decay must be in \[0, 1\), not 1.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GANTrainer(TinyG(), TinyD(), **options)
