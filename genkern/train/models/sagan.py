"""A class-conditional GAN after SAGAN, scaled down to small images and grown by stages.

An image of `size` is halved until 4 to 7 pixels are left: 8 gives one stage, 64 gives four.
`width` channels at full size double with every halving, up to 8·width. Self-attention sits at half
the image's size (at full size for 8×8), in the generator and in the discriminator.

SiLU instead of ReLU: at a kink, rounding alone turns a gradient on or off, and within ten steps two
exact implementations of one op train visibly different models. Smooth, they stay together (and so
do their second derivatives, which R1 takes).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genkern
from genkern.nn import SelfAttention2d

LABEL_FEATURES = 32


class Generator(nn.Module):
    """G(z, y): noise z [B, z_dim] and class labels y [B] (int64) to images [B, C, size, size]
    in (-1, 1). The noise and the label's embedding steer every normalisation (as in BigGAN)."""

    def __init__(self, size: int, classes: int, *, channels=1, width=32, z_dim=32) -> None:
        super().__init__()
        sizes, widths = _stages(size, width)
        self.z_dim, self.classes, self.base = z_dim, classes, sizes[-1]
        condition = z_dim + LABEL_FEATURES
        self.label = nn.Embedding(classes, LABEL_FEATURES)
        self.project = nn.Linear(condition, widths[-1] * self.base**2)
        stages = list(zip(sizes, widths, strict=True))
        self.blocks = nn.ModuleList()
        for (_, wide), (larger, narrow) in zip(stages[:0:-1], stages[-2::-1], strict=True):
            block = GeneratorBlock(wide, narrow, condition)
            block.attention = _attention(larger, size, narrow)
            self.blocks.append(block)
        self.norm = nn.BatchNorm2d(widths[0])
        self.to_image = nn.Conv2d(widths[0], channels, 3, padding=1)
        _orthogonal(self)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        condition = torch.cat([z, self.label(y)], 1)
        x = self.project(condition).unflatten(1, (-1, self.base, self.base))
        for block in self.blocks:
            x = block(x, condition)
        return torch.tanh(self.to_image(F.silu(self.norm(x))))


class Discriminator(nn.Module):
    """D(x, y): images [B, C, size, size] and labels y [B] to logits [B].

    Every weight is spectrally normalised, all of them in one call a forward; the label enters as a
    projection (Miyato & Koyama 2018). `dtype` is that of the weights from the start: u and v are
    first found in it."""

    def __init__(
        self, size: int, classes: int, *, channels=1, width=32, dtype=torch.float32
    ) -> None:
        super().__init__()
        sizes, widths = _stages(size, width)
        first = DiscriminatorBlock(channels, width, from_image=True)
        first.attention = _attention(size, size, width)
        self.blocks = nn.ModuleList([first])
        for i in range(1, len(sizes)):
            block = DiscriminatorBlock(widths[i - 1], widths[i], halve=True)
            block.attention = _attention(sizes[i], size, widths[i])
            self.blocks.append(block)
        self.blocks.append(DiscriminatorBlock(widths[-1], widths[-1]))
        self.logit = nn.Linear(widths[-1], 1)
        self.label = nn.Embedding(classes, widths[-1])
        _orthogonal(self)
        genkern.spectral_norm(self.to(dtype), recurse=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        features = F.silu(x).sum((2, 3))
        return self.logit(features).squeeze(1) + (features * self.label(y)).sum(1)


class GeneratorBlock(nn.Module):
    """Doubles the image: two convolutions, each after a conditional normalisation, and a skip.

    No biases: the next normalisation takes them out again, and their gradients would be rounding
    noise, which Adam turns into steps of full size."""

    def __init__(self, wide, narrow, condition):
        super().__init__()
        self.norm1 = ConditionalNorm(wide, condition)
        self.conv1 = nn.Conv2d(wide, narrow, 3, padding=1, bias=False)
        self.norm2 = ConditionalNorm(narrow, condition)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(wide, narrow, 1, bias=False)
        self.attention = nn.Identity()

    def forward(self, x, condition):
        y = self.conv1(_double(F.silu(self.norm1(x, condition))))
        y = self.conv2(F.silu(self.norm2(y, condition)))
        return self.attention(y + _double(self.skip(x)))


class DiscriminatorBlock(nn.Module):
    """Two convolutions and a skip; halves the image where `halve` says so."""

    def __init__(self, before, after, *, halve=False, from_image=False):
        super().__init__()
        self.halve, self.from_image = halve, from_image
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if halve or from_image else nn.Identity()
        self.attention = nn.Identity()

    def forward(self, x):
        y = self.conv2(F.silu(self.conv1(x if self.from_image else F.silu(x))))
        if self.halve:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return self.attention(y + self.skip(x))


class ConditionalNorm(nn.Module):
    """Batch normalisation whose gain and bias are linear in the condition."""

    def __init__(self, channels, condition):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Linear(condition, 2 * channels)

    def forward(self, x, condition):
        gain, bias = self.affine(condition)[:, :, None, None].chunk(2, 1)
        return self.norm(x) * (1 + gain) + bias


def _stages(size, width):
    """The sizes from the image down, and the channels at each: 32 gives 32, 16, 8, 4."""
    if size < 8 or size % 8:
        raise ValueError(f"size must be a multiple of 8 (8, 16, 24, …), not {size}")
    sizes = [size]
    while sizes[-1] % 2 == 0 and sizes[-1] >= 8:
        sizes.append(sizes[-1] // 2)
    return sizes, [width * min(2**i, 8) for i in range(len(sizes))]


def _attention(here, image, channels):
    return SelfAttention2d(channels) if here == max(8, image // 2) else nn.Identity()


def _double(x):
    return F.interpolate(x, scale_factor=2)


def _orthogonal(model):
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
