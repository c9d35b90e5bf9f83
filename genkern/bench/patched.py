"""Two published discriminators, written with torch's spectral norm and torch's losses, before and
after `genkern.patch`: the same loss curve, and the time of a whole step of both.

    python -m genkern.bench.patched

A step is one update of the discriminator: logits of real and of fake samples, loss, backward, Adam.
Real samples are scikit-learn's digits (SNGAN) and sums of sine waves (HiFi-GAN), fake ones the same
with noise on top.
"""

import copy
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import genkern
from genkern import losses


class SNGANBlock(nn.Module):
    def __init__(self, before, after, first=False, halve=False):
        super().__init__()
        self.first, self.halve = first, halve
        self.conv1 = spectral_norm(nn.Conv2d(before, after, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(after, after, 3, padding=1))
        resized = halve or before != after
        self.skip = spectral_norm(nn.Conv2d(before, after, 1)) if resized else nn.Identity()

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        x = self.skip(x)
        return F.avg_pool2d(x + y, 2) if self.halve else x + y


class SNGAN32(nn.Module):
    """The residual discriminator of SNGAN for 32×32 images (Miyato et al. 2018, table 4):
    [B, 3, 32, 32] to logits [B]."""

    def __init__(self, width=128):
        super().__init__()
        self.blocks = nn.Sequential(
            SNGANBlock(3, width, first=True, halve=True),
            SNGANBlock(width, width, halve=True),
            SNGANBlock(width, width),
            SNGANBlock(width, width),
        )
        self.logit = spectral_norm(nn.Linear(width, 1))

    def forward(self, x):
        return self.logit(F.relu(self.blocks(x)).sum((2, 3))).squeeze(1)


class HiFiGANScale(nn.Module):
    """The first scale discriminator of HiFi-GAN (Kong et al. 2020, appendix A.2), the one with
    spectral norm: waves [B, 1, T] to logits [B, T / 64]. `width` is 128 there."""

    def __init__(self, width=128):
        super().__init__()
        w = width
        shapes = [  # in, out, kernel, stride, groups
            (1, w, 15, 1, 1),
            (w, w, 41, 2, 4),
            (w, 2 * w, 41, 2, 16),
            (2 * w, 4 * w, 41, 4, 16),
            (4 * w, 8 * w, 41, 4, 16),
            (8 * w, 8 * w, 41, 1, 16),
            (8 * w, 8 * w, 5, 1, 1),
            (8 * w, 1, 3, 1, 1),
        ]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv1d(i, o, k, stride, k // 2, groups=groups))
            for i, o, k, stride, groups in shapes
        )

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.1)
        return self.layers[-1](x).flatten(1)


class Setting(NamedTuple):
    """A discriminator, real samples, and the loss as its paper's code and as genkern has it."""

    model: nn.Module
    real: torch.Tensor
    eager_loss: object
    loss: object


def hinge(real, fake):
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def least_squares(real, fake):
    return (1 - real).square().mean() + fake.square().mean()


def sngan(batch=16, width=128):
    from sklearn.datasets import load_digits

    digits = torch.tensor(load_digits().images[:batch], dtype=torch.float32) / 8 - 1
    real = F.interpolate(digits[:, None], size=32).expand(-1, 3, -1, -1).contiguous()
    return Setting(SNGAN32(width), real, hinge, losses.hinge.d)


def hifigan(batch=2, samples=8192, width=128):
    at = torch.arange(samples) / 22050
    pitches = torch.linspace(110, 880, batch)[:, None, None]
    real = sum(torch.sin(2 * torch.pi * k * pitches * at) / k for k in (1, 2, 3)) / 2
    return Setting(HiFiGANScale(width), real, least_squares, lambda r, f: 2 * losses.lsgan.d(r, f))


class Comparison(NamedTuple):
    """report: what `patch` said. curves: the losses of both, step by step. seconds: medians of a
    step's time."""

    report: str
    eager_curve: list
    curve: list
    eager_seconds: float
    seconds: float


def compare(setting, steps, lr=1e-5):
    """Trains the discriminator as it is and patched, from the same start on the same samples, a
    step of the one after a step of the other."""
    eager, ours = setting.model, copy.deepcopy(setting.model)
    report = str(genkern.patch(ours, verbose=False))
    sides = [
        (model, torch.optim.Adam(model.parameters(), lr, betas=(0.0, 0.9)), loss, [], [])
        for model, loss in ((eager, setting.eager_loss), (ours, setting.loss))
    ]
    noise = torch.Generator().manual_seed(0)
    for _ in range(steps):
        fake = torch.randn(setting.real.shape, generator=noise, dtype=setting.real.dtype)
        fake = setting.real + 0.2 * fake
        for model, optimizer, loss, curve, seconds in sides:
            begun = time.perf_counter()
            optimizer.zero_grad()
            value = loss(model(setting.real), model(fake))
            value.backward()
            optimizer.step()
            curve.append(value.item())
            seconds.append(time.perf_counter() - begun)
    medians = [statistics.median(seconds) for *_, seconds in sides]
    return Comparison(report, sides[0][3], sides[1][3], *medians)


def main(steps=20):
    torch.manual_seed(0)
    for name, make in (("SNGAN-32", sngan), ("HiFi-GAN MSD[0]", hifigan)):
        result = compare(make(), steps)
        print(f"{name}: {result.report}")
        print("  step      torch    patched")
        for step in (0, 1, 2, 5, 10, steps - 1):
            print(f"  {step:4d} {result.eager_curve[step]:10.6f} {result.curve[step]:10.6f}")
        ratio = result.eager_seconds / result.seconds
        print(
            f"  step time: torch {result.eager_seconds * 1e3:.1f} ms, patched "
            f"{result.seconds * 1e3:.1f} ms ({ratio:.2f}x; medians of {steps} interleaved steps, "
            f"{torch.get_num_threads()} threads)"
        )


if __name__ == "__main__":
    main()
