"""LeCam regularisation."""

import torch
from torch import nn

from genkern.ops._autograd import entry
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
        real_means, fake_means = self.means.unbind()
        terms = []
        for side, means, other in ((reals, fake_means, 1.0), (fakes, real_means, -1.0)):
            means = [means] if len(side) == 1 else means.split(1)
            sign = other if self.one_sided else 0.0
            terms += [_squared(x, m, sign, self.weight) for x, m in zip(side, means, strict=True)]
        return sum(terms[1:], terms[0])

    @torch.no_grad()
    def _update(self, logits):
        # The newest counts 1 of the weights so far, an update before it d, and so on: divided by
        # their sum, there is no bias towards the start. New tensors, not in place: the graph of an
        # earlier call holds the old ones.
        self.weights = torch.add(1, self.weights, alpha=self.decay)
        new = torch.stack([x.mean() for x in logits]).to(self.means).view_as(self.means)
        self.means = torch.lerp(self.means, new, self.weights.reciprocal())


class _Squared(torch.autograd.Function):
    """weight · mean (x - m)², only where (x - m) · sign > 0 if sign is not 0; m `[1]` a constant.
    What is kept is the difference: its gradient is one multiplication."""

    @staticmethod
    def forward(ctx, logits, mean, sign, weight):
        away = logits - mean
        if sign:
            away = away.clamp_(min=0) if sign > 0 else away.clamp_(max=0)
        ctx.save_for_backward(logits, mean, away)
        ctx.sign, ctx.weight = sign, weight
        return away.square().mean().mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        logits, mean, away = ctx.saved_tensors
        if torch.is_grad_enabled():
            away = logits - mean
            if ctx.sign:
                away = ctx.sign * (ctx.sign * away).relu()
        return away * (grad * (2 * ctx.weight / max(1, away.numel()))), None, None, None


_squared = entry(_Squared)
