"""StyleGAN2's path length, LeCam and lazy regularisation, against their formulas."""

import copy
import math

import pytest
import torch
from torch import nn

import genkern
from genkern import losses


class Synthesis(nn.Module):
    """Latents [B, rows, w] to images [B, 2, 4, 4]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 32) for _ in range(2))

    def forward(self, w):
        x = sum(torch.tanh(layer(w[:, i])) for i, layer in enumerate(self.layers))
        return x.view(-1, 2, 4, 4)


def test_path_length_is_stylegan2s():
    torch.manual_seed(0)
    G = Synthesis().double()
    path_length, running = losses.PathLength(weight=2.0, decay=0.9), 0.0
    for _ in range(3):
        w = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(5, 2, 4, 4, dtype=torch.float64)
        with genkern.explain() as log:
            value = path_length(G(w), w, noise=noise)
            grads = torch.autograd.grad(value, list(G.parameters()))
        assert {(c.op, c.backend) for c in log} == {
            ("sample_norms", "cpu"),
            ("sample_norms.backward", "cpu"),
        }
        (slope,) = torch.autograd.grad((G(w) * noise / math.sqrt(16)).sum(), w, create_graph=True)
        lengths = slope.pow(2).sum(2).mean(1).sqrt()
        mean = running + 0.1 * (lengths.mean() - running)
        expected = 2 * ((lengths - mean) ** 2).mean()
        running = mean.detach()
        exact = torch.autograd.grad(expected, list(G.parameters()))
        # The running mean is kept in fp32.
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(list(grads), list(exact), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(path_length.mean_length.double(), running, rtol=1e-6, atol=0)


def test_path_length_draws_noise_and_rests_in_eval():
    G, path_length = Synthesis(), losses.PathLength().eval()
    w = torch.randn(5, 2, 3, requires_grad=True)
    assert path_length(G(w), w) > 0 and path_length.mean_length == 0
    path_length.train()(G(w), w)
    assert path_length.mean_length > 0
    assert list(path_length.state_dict()) == ["mean_length"]


def lecam_by_hand(real, fake, alpha_real, alpha_fake, one_sided):
    keep = (lambda x: torch.clamp(x, min=0)) if one_sided else (lambda x: x)
    return (keep(real - alpha_fake) ** 2).mean() + (keep(alpha_real - fake) ** 2).mean()


@pytest.mark.parametrize("one_sided", [False, True])
def test_lecam(one_sided):
    lecam = losses.LeCam(weight=0.3, decay=0.9, one_sided=one_sided)
    weights, means = [], []
    for _ in range(4):
        real = torch.randn(7, 2, requires_grad=True)
        fake = torch.randn(5, requires_grad=True)
        value = lecam(real, fake)
        # The unbiased running mean: weights 0.9^age, divided by their sum.
        weights = [0.9 * w for w in weights] + [1.0]
        means.append((real.mean().item(), fake.mean().item()))
        alpha_real, alpha_fake = (
            sum(w * m[side] for w, m in zip(weights, means, strict=True)) / sum(weights)
            for side in (0, 1)
        )
        expected = 0.3 * lecam_by_hand(real, fake, alpha_real, alpha_fake, one_sided)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(value, [real, fake]),
            torch.autograd.grad(expected, [real, fake]),
            rtol=1e-5,
            atol=1e-6,
        )


def test_lecam_of_lists_rests_in_eval_and_reloads():
    lecam = losses.LeCam(discriminators=2)
    apart = [losses.LeCam(), losses.LeCam()]
    for _ in range(3):
        reals, fakes = ([torch.randn(4, n).bfloat16() for n in (1, 3)] for _ in range(2))
        got = lecam(reals, fakes)
        parts = [module(r, f) for module, r, f in zip(apart, reals, fakes, strict=True)]
        torch.testing.assert_close(got, sum(parts))
        assert got.dtype == torch.float32
    other = losses.LeCam(discriminators=2)
    other.load_state_dict(copy.deepcopy(lecam.state_dict()))
    frozen = lecam.eval()(reals, fakes)
    assert torch.equal(frozen, lecam(reals, fakes))
    assert torch.equal(frozen, other.eval()(reals, fakes))


@pytest.mark.parametrize("one_sided", [False, True])
def test_lecam_gradcheck(one_sided):
    lecam = losses.LeCam(one_sided=one_sided).eval()
    lecam.means = torch.tensor([[0.3], [-0.2]], dtype=torch.float64)
    real = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lecam, (real, fake))
    assert torch.autograd.gradgradcheck(lecam, (real, fake))
    expected = 0.3 * lecam_by_hand(real, fake, 0.3, -0.2, one_sided)
    torch.testing.assert_close(lecam(real, fake), expected)


@pytest.mark.parametrize("one_sided", [False, True])
def test_lecam_compiled(one_sided):
    lecam = losses.LeCam(one_sided=one_sided)
    real, fake = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    eager = copy.deepcopy(lecam)(real, fake)
    torch._dynamo.reset()
    got = torch.compile(lecam, fullgraph=True)(real, fake)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(
        torch.autograd.grad(got, [real, fake]), torch.autograd.grad(eager, [real, fake])
    )


def test_lecam_two_calls_before_one_backward():
    lecam, real, fake = losses.LeCam(), torch.randn(4, requires_grad=True), torch.randn(4)
    (lecam(real, fake) + lecam(real * 2, fake)).backward()
    assert real.grad.isfinite().all()


def test_nothing_waits_for_the_device():
    """On the meta device, reading a number back raises."""
    lecam = losses.LeCam().to("meta")
    lecam(torch.randn(4, device="meta"), torch.randn(4, device="meta"))


def test_lazy():
    every = losses.lazy(16)
    assert [step for step in range(40) if every.due(step)] == [0, 16, 32]
    options = every.adam(lr=0.002, betas=(0.0, 0.99))
    torch.testing.assert_close(options["lr"], 0.002 * 16 / 17)
    torch.testing.assert_close(options["betas"], (0.0, 0.99 ** (16 / 17)))
    assert every.scaled(torch.tensor(2.0)) == 32
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: losses.lazy(0), "interval must be an integer above 0, not 0"),
        (lambda: losses.PathLength(decay=1.0), r"decay must be in \[0, 1\), not 1.0"),
        (lambda: losses.PathLength()(torch.ones(2, 3), torch.ones(2, 3)), "latents must require"),
        (lambda: losses.LeCam(decay=-1), r"decay must be in \[0, 1\), not -1"),
        (lambda: losses.LeCam(discriminators=0), "discriminators must be at least 1, not 0"),
        (lambda: losses.LeCam()([torch.ones(2)] * 2, torch.ones(2)), "of 1 discriminators, not of"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
