"""Gradient penalties: values and weights' gradients are those of the formulas in plain PyTorch."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import genkern
from genkern import losses

PENALTIES = ["r1", "r2", "wgan_gp", "one-sided", "zero_centered_gp", "max_gp", "dragan"]


def discriminator(normalize):
    """Convolutions, attention, spectral normalization: [B, 2, 8, 8] to [B] in fp64."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.SiLU(),
        genkern.nn.SelfAttention2d(16),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(256, 1),
    ).double()
    nn.init.constant_(model[2].gamma, 0.7)
    if normalize == "ours":
        return genkern.spectral_norm(model, recurse=True)
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            torch_spectral_norm(module)
    return model


def softmax_attention(q, k, v, *, scale):
    return torch.softmax(scale * (q @ k.mT), -1) @ v


def samples():
    torch.manual_seed(4)
    return torch.randn(2, 5, 2, 8, 8, dtype=torch.float64)


def ours(name, D, real, fake, scaler=None):
    torch.manual_seed(5)
    if name in ("r1", "r2"):
        x = (real if name == "r1" else fake).requires_grad_()
        return getattr(losses, name)(D(x), x, gamma=3.0, scaler=scaler)
    if name == "dragan":
        return losses.dragan(D, real, weight=4.0, scaler=scaler)
    one_sided = {"one_sided": True, "center": 0.3} if name == "one-sided" else {}
    function = getattr(losses, "wgan_gp" if name == "one-sided" else name)
    return function(D, real, fake, weight=4.0, scaler=scaler, **one_sided)


def by_hand(name, D, real, fake):
    torch.manual_seed(5)
    batch = len(real)
    alpha = torch.rand(batch, 1, 1, 1, dtype=real.dtype) if name not in ("r1", "r2") else None
    if name == "r1":
        x = real
    elif name == "r2":
        x = fake
    elif name == "dragan":
        torch.manual_seed(5)
        uniform = torch.rand(real.shape, dtype=real.dtype)
        alpha = torch.rand(batch, 1, 1, 1, dtype=real.dtype)
        x = real + alpha * 0.5 * real.std() * uniform
    else:
        x = alpha * real + (1 - alpha) * fake
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    norms = g.flatten(1).norm(2, dim=1)
    return {
        "r1": lambda: 3.0 / 2 * (norms**2).mean(),
        "r2": lambda: 3.0 / 2 * (norms**2).mean(),
        "wgan_gp": lambda: 4 * ((norms - 1) ** 2).mean(),
        "one-sided": lambda: 4 * (torch.clamp(norms - 0.3, min=0) ** 2).mean(),
        "zero_centered_gp": lambda: 4 * (norms**2).mean(),
        "max_gp": lambda: 4 * norms.max() ** 2,
        "dragan": lambda: 4 * ((norms - 1) ** 2).mean(),
    }[name]()


def weights_gradient(penalty, D):
    return torch.autograd.grad(penalty, list(D.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", PENALTIES)
def test_weights_gradients_are_eagers(name, monkeypatch):
    """Through convolutions, genkern's spectral norm and attention, in fp64."""
    real, fake = samples()
    D = discriminator("ours")
    with genkern.explain() as log:
        penalty = ours(name, D, real.clone(), fake.clone())
        grads = weights_gradient(penalty, D)
    ran = [(c.op, c.backend) for c in log if c.op.startswith("sample_norms")]
    assert ran == [("sample_norms", "cpu"), ("sample_norms.backward", "cpu")]
    assert ("attention.second", "cpu") in [(c.op, c.backend) for c in log]

    monkeypatch.setattr(genkern, "attention", softmax_attention)
    plain = discriminator("torch's")
    plain.load_state_dict(discriminator("ours").state_dict())
    with genkern.explain() as log:
        expected = by_hand(name, plain, real, fake)
        keys = [key for key, _ in plain.named_parameters()]
        exact = dict(zip(keys, weights_gradient(expected, plain), strict=True))
    assert not log
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=1e-12)
    some = 0
    for (key, _), got in zip(D.named_parameters(), grads, strict=True):
        if exact[key] is None:
            assert got is None or not got.any()
            continue
        some += 1
        difference = (got - exact[key]).abs().max()
        assert difference <= 1e-10 * exact[key].abs().max().clamp_min(1e-3), key
    assert some >= 6


@pytest.mark.parametrize("name", PENALTIES)
def test_backends_agree_in_half_precision(name):
    """bf16 discriminators: the squares are summed in fp32 either way."""
    torch.manual_seed(0)
    D = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    real, fake = samples().bfloat16()
    results = []
    for backend in ("cpu", "reference"):
        with genkern.use_backend(backend):
            results.append(ours(name, D, real.clone(), fake.clone()))
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def critics():
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2)]


def test_lists_of_discriminators_and_inputs():
    one, two = critics()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    separate = losses.r1(one(x), x, 2.0) + losses.r1(two(y), y, 2.0)
    with genkern.explain() as log:
        together = losses.r1([one(x), two(y)], [x, y], 2.0)
    assert len(log) == 1
    torch.testing.assert_close(together, separate)
    shared = losses.r1([one(x), two(x)], x, 2.0)
    torch.testing.assert_close(shared, losses.r1(one(x), x, 2.0) + losses.r1(two(x), x, 2.0))
    # One discriminator that looks at two inputs: their squares add up sample by sample.
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    both = losses.r1(one(x) * two(z), [x, z], 2.0)
    gx, gz = torch.autograd.grad((one(x) * two(z)).sum(), [x, z])
    torch.testing.assert_close(both, (gx.square().sum(1) + gz.square().sum(1)).mean())


def test_interpolation_of_lists_takes_one_alpha_for_all():
    seen = []

    def D(xs, label):
        assert label == 7
        seen.extend(xs)
        return [x.sum((1, 2)) ** 2 for x in xs]

    zeros = [torch.zeros(4, 3, 2), torch.zeros(4, 5, 1)]
    ones = [torch.ones(4, 3, 2), torch.ones(4, 5, 1)]
    generator = torch.Generator().manual_seed(3)
    value = losses.wgan_gp(D, ones, zeros, 7, generator=generator)
    alpha = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert value.shape == ()
    for x in seen:
        torch.testing.assert_close(x, alpha.view(4, 1, 1).expand(x.shape))


def test_several_outputs_of_one_discriminator_call():
    one, two = critics()
    real, fake = torch.randn(2, 6, 3, dtype=torch.float64)
    torch.manual_seed(0)
    got = losses.wgan_gp(lambda x: [one(x), two(x)], real, fake)
    parts = []
    for D in (one, two):
        torch.manual_seed(0)
        parts.append(losses.wgan_gp(D, real, fake))
    torch.testing.assert_close(got, sum(parts))


def test_a_scaler_keeps_small_gradients():
    """fp16 discriminators whose input gradients underflow: with the scaler they survive."""
    weight = torch.full((3, 1), 3e-8, dtype=torch.float32)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x.float() @ weight).half()

        @staticmethod
        def backward(ctx, g):
            return g * weight.mT.half().clamp_min(0) * 0.25

    class Scale:  # of torch.amp.GradScaler the one method that is used
        def scale(self, x):
            return x * 2.0**12

    x = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    plain = losses.r1(Steep.apply(x), x, 2.0)
    scaled = losses.r1(Steep.apply(x), x, 2.0, scaler=Scale())
    assert plain == 0
    expected = 3 * (float(weight.half()[0]) * 0.25) ** 2
    torch.testing.assert_close(scaled.item(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_real_scaler_changes_nothing_in_fp32(name):
    D = critics()[0].float()
    real, fake = torch.randn(2, 6, 3)
    real, fake = real[:, None, None], fake[:, None, None]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    got = ours(name, D, real.clone(), fake.clone(), scaler)
    torch.testing.assert_close(got, ours(name, D, real.clone(), fake.clone()))


def test_under_autocast():
    D, (real, fake) = critics()[0].float(), torch.randn(2, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.wgan_gp(D, real, fake)
    value.backward()
    assert value.dtype == torch.float32 and D[0].weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda D, x: losses.r1(D(x), x), "losses.r1: inputs must require gradients"),
        (
            lambda D, x: losses.r2(D(x).detach(), x.clone().requires_grad_()),
            "losses.r2: logits must be attached",
        ),
        (lambda D, x: losses.r1([D(x), D(x)], [x]), "a list as long as that of logits, 2, not 1"),
        (lambda D, x: losses.wgan_gp(D, x, x[:2]), r"one shape .* not \(4, 3\) and \(2, 3\)"),
        (lambda D, x: losses.max_gp(D, [x], x), "losses.max_gp: real and fake must both be"),
        (lambda D, x: losses.max_gp(D, x[:0], x[:0]), "no largest norm of no samples"),
        (lambda D, x: losses.dragan(D, torch.ones(())), "losses.dragan: real must have a shape"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(critics()[0].float(), torch.randn(4, 3))
