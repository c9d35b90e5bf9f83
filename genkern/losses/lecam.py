"""LeCam regularisation."""

import torch
import torch.nn.functional as F
from torch import nn

from genkern.ops._tensors import check_floating


class LeCam(nn.Module):
    """weight · (mean (r - α_f)² + mean (f - α_r)²)  (Tseng et al. 2021, eqs. 8 and 9)

    r, f: logits of real and fake samples; α_r, α_f: running means of the mean logits, kept on the
    device as buffers without bias towards their start, decay 0.99 (both as in the authors' code).
    Each call in training mode first brings its logits into them. one_sided: max(r - α_f, 0)² and
    max(α_r - f, 0)², which is what the authors' code computes. Nothing waits for the device.

    discriminators: how many logits a list has; each has its own running means, and the terms add
    up. weight: the paper's 0.3 is for CIFAR; its larger images take 0.01.
    """

    def __init__(
        self,
        weight: float = 0.3,
        decay: float = 0.99,
        *,
        one_sided: bool = False,
        discriminators: int = 1,
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"losses.LeCam: decay must be in [0, 1), not {decay}")
        if discriminators < 1:
            raise ValueError(
                f"losses.LeCam: discriminators must be at least 1, not {discriminators}"
            )
        self.weight, self.decay, self.one_sided = weight, decay, one_sided
        self.register_buffer("means", torch.zeros(2, discriminators))  # α_r, α_f
        self.register_buffer("weights", torch.zeros(()))  # 1 + d + d² + …, one for each update

    def forward(self, real, fake):
        """The penalty, 0-dim, of the logits `real` and `fake`: tensors of any shape, or lists with
        one entry for each discriminator."""
        reals = list(real) if isinstance(real, (list, tuple)) else [real]
        fakes = list(fake) if isinstance(fake, (list, tuple)) else [fake]
        if not len(reals) == len(fakes) == self.means.shape[1]:
            raise ValueError(
                f"losses.LeCam: real and fake must hold the logits of {self.means.shape[1]} "
                f"discriminators, not of {len(reals)} and {len(fakes)}"
            )
        names = [f"{side}[{i}]" for side in ("real", "fake") for i in range(len(reals))]
        check_floating("losses.LeCam", **dict(zip(names, reals + fakes, strict=True)))
        reals, fakes = (
            [x.float() if x.element_size() < 4 else x for x in s] for s in (reals, fakes)
        )
        if self.training:
            self._update(reals + fakes)
        # Logits of one side against the mean of the other.
        away = zip(reals + fakes, self.means.flip(0).flatten().unbind(), strict=True)
        signs = [1.0] * len(reals) + [-1.0] * len(fakes)
        terms = [
            self._squared(x, mean.to(x.dtype), sign)
            for (x, mean), sign in zip(away, signs, strict=True)
        ]
        return self.weight * sum(terms[1:], terms[0])

    def _squared(self, logits, mean, sign):
        if self.one_sided:
            return (sign * (logits - mean)).relu().square().mean()
        return F.mse_loss(logits, mean.expand(logits.shape))

    @torch.no_grad()
    def _update(self, logits):
        # The newest counts 1 of the weights so far, an update before it d, and so on: divided by
        # their sum, there is no bias towards the start. New tensors, not in place: the graph of an
        # earlier call holds the old ones.
        self.weights = 1 + self.decay * self.weights
        new = torch.stack([x.mean() for x in logits]).to(self.means).view_as(self.means)
        self.means = torch.lerp(self.means, new, 1 / self.weights)
