"""The losses that are measured: adversarial ones, and the list of them of a HiFi-GAN step."""

import torch
import torch.nn.functional as F

from genkern import losses
from genkern.bench.workload import Workload, compiled, numbers

EAGER_D = {
    "hinge": lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
    "nonsaturating": lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(),
    "lsgan": lambda r, f: 0.5 * (r - 1).square().mean() + 0.5 * f.square().mean(),
    "wgan": lambda r, f: f.mean() - r.mean(),
    "rpgan": lambda r, f: F.softplus(f - r).mean(),
    "ragan": lambda r, f: F.softplus(f.mean() - r).mean() + F.softplus(f - r.mean()).mean(),
    "rahinge": lambda r, f: F.relu(1 + f.mean() - r).mean() + F.relu(1 + f - r.mean()).mean(),
    "rals": lambda r, f: (r - f.mean() - 1).square().mean() + (f - r.mean() + 1).square().mean(),
}
EAGER_G = {
    "hinge": lambda f: -f.mean(),
    "nonsaturating": lambda f: F.softplus(-f).mean(),
    "saturating": lambda f: -F.softplus(f).mean(),
    "lsgan": lambda f: 0.5 * (f - 1).square().mean(),
}


def adversarial(name, side, count, dtype=torch.float32, quick=False):
    def build(implementation, dtype):
        inputs = [numbers(count, dtype=dtype) for _ in ("real", "fake")[: 2 if side == "D" else 1]]
        loss = losses.get(name)
        ours = loss.d if side == "D" else loss.g
        eager = (EAGER_D if side == "D" else EAGER_G)[name]
        function = compiled(ours if implementation == "genkern" else eager, implementation)

        def step():
            loss = function(*inputs)
            return loss, *torch.autograd.grad(loss, inputs)

        return step

    return Workload(f"{name} {side}", str(count), dtype, build, quick=quick)


# ---- HiFi-GAN -----------------------------------------------------------------------------------


def hifi_gan_maps(batch, samples):
    """The shapes of the feature maps of HiFi-GAN's discriminators (Kong et al. 2020: five of
    periods, three of scales), by discriminator; the last map of each is its logits."""

    def after(n, kernel, stride, padding):
        return (n + 2 * padding - kernel) // stride + 1

    discriminators = []
    for period in (2, 3, 5, 7, 11):
        n, maps = -(-samples // period), []
        for channels, stride in ((32, 3), (128, 3), (512, 3), (1024, 3), (1024, 1)):
            n = after(n, 5, stride, 2)
            maps.append((batch, channels, n, period))
        discriminators.append([*maps, (batch, 1, n, period)])
    n = samples
    for scale in range(3):
        n = n if scale == 0 else after(n, 4, 2, 2)
        length, maps = n, []
        for channels, kernel, stride in (
            (128, 15, 1),
            (128, 41, 2),
            (256, 41, 2),
            (512, 41, 4),
            (1024, 41, 4),
            (1024, 41, 1),
            (1024, 5, 1),
        ):
            length = after(length, kernel, stride, kernel // 2)
            maps.append((batch, channels, length))
        discriminators.append([*maps, (batch, 1, length)])
    return discriminators


def eager_hifi_gan(real, fake, real_maps, fake_maps):
    loss = 0
    for r, f in zip(real, fake, strict=True):
        loss = loss + ((1 - r) ** 2).mean() + (f**2).mean()
    for f in fake:
        loss = loss + ((1 - f) ** 2).mean()
    matching = 0
    for of_real, of_fake in zip(real_maps, fake_maps, strict=True):
        for r, f in zip(of_real, of_fake, strict=True):
            matching = matching + (r - f).abs().mean()
    return loss + 2 * matching


def our_hifi_gan(real, fake, real_maps, fake_maps):
    return (
        losses.lsgan.d(real, fake, factor=1.0)
        + losses.lsgan.g(fake, factor=1.0)
        + losses.feature_matching(real_maps, fake_maps)
    )


def hifi_gan(batch, samples, dtype=torch.float32):
    """All losses of a step: the discriminators' and the generator's of eight lists of logits, and
    the feature matching of 54 maps."""

    def build(implementation, dtype):
        shapes = hifi_gan_maps(batch, samples)
        real_maps, fake_maps = (
            [[numbers(*s, dtype=dtype, grad=grad) for s in maps] for maps in shapes]
            for grad in (False, True)
        )
        real, fake = ([numbers(*maps[-1], dtype=dtype) for maps in shapes] for _ in range(2))
        inputs = [*real, *fake, *[x for maps in fake_maps for x in maps]]
        ours = our_hifi_gan if implementation == "genkern" else eager_hifi_gan
        function = compiled(ours, implementation)

        def step():
            loss = function(real, fake, real_maps, fake_maps)
            return loss, *torch.autograd.grad(loss, inputs)

        return step

    return Workload("HiFi-GAN losses", f"{batch}×{samples}", dtype, build)


def loss_workloads():
    few = [adversarial(name, "D", 64) for name in EAGER_D if name != "hinge"]
    many = [adversarial(name, "D", 262144) for name in EAGER_D if name != "hinge"]
    return [
        adversarial("hinge", "D", 64, quick="compiled"),
        adversarial("hinge", "D", 262144, quick="compiled"),
        *few,
        *[adversarial(name, "G", 64) for name in EAGER_G],
        *many,
        *[adversarial(name, "G", 262144) for name in EAGER_G],
        adversarial("nonsaturating", "D", 262144, dtype=torch.bfloat16),
        hifi_gan(2, 512),
        hifi_gan(16, 8192),
    ]
