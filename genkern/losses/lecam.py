"""LeCam regularisation."""

import torch
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
        self.register_buffer("real_mean", torch.zeros(discriminators))
        self.register_buffer("fake_mean", torch.zeros(discriminators))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, real, fake):
        """The penalty, 0-dim, of the logits `real` and `fake`: tensors of any shape, or lists with
        one entry for each discriminator."""
        reals = list(real) if isinstance(real, (list, tuple)) else [real]
        fakes = list(fake) if isinstance(fake, (list, tuple)) else [fake]
        if not len(reals) == len(fakes) == len(self.real_mean):
            raise ValueError(
                f"losses.LeCam: real and fake must hold the logits of {len(self.real_mean)} "
                f"discriminators, not of {len(reals)} and {len(fakes)}"
            )
        names = [f"{side}[{i}]" for side in ("real", "fake") for i in range(len(reals))]
        check_floating("losses.LeCam", **dict(zip(names, reals + fakes, strict=True)))
        reals, fakes = (
            [x.float() if x.element_size() < 4 else x for x in s] for s in (reals, fakes)
        )
        if self.training:
            self._update(reals, fakes)
        terms = [
            self._away(r - self.fake_mean[i]) + self._away(self.real_mean[i] - f)
            for i, (r, f) in enumerate(zip(reals, fakes, strict=True))
        ]
        return self.weight * sum(terms[1:], terms[0])

    def _away(self, difference):
        return (difference.relu() if self.one_sided else difference).square().mean()

    @torch.no_grad()
    def _update(self, reals, fakes):
        # (1 - d)/(1 - dᵗ) of the newest is the running mean divided by its weights so far. New
        # tensors, not in place: the graph of an earlier call holds the old ones.
        self.updates = self.updates + 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        for name, logits in (("real_mean", reals), ("fake_mean", fakes)):
            old = getattr(self, name)
            new = torch.stack([x.mean() for x in logits]).to(old)
            setattr(self, name, old + share * (new - old))
