"""LeCam regularisation."""

import torch
from torch import nn

from genkern.ops._autograd import entry
from genkern.ops._tensors import check_floating


class LeCam(nn.Module):
    """weight · (mean (r - α_f)² + mean (f - α_r)²)  (Tseng et al. 2021)

    r, f: logits of real and fake samples; α_r, α_f: running means of the mean logits, kept on the
    device as buffers without bias towards their start.
    Each call in training mode first brings its logits into them. one_sided: max(r - α_f, 0)² and
    max(α_r - f, 0)², which is what the authors' code computes. Nothing waits for the device.

    discriminators: how many logits a list has; each has its own running means, and the terms add
    up. weight: 0.3 is that of the authors' CIFAR scripts.
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
        one = _OneDiscriminator.apply if torch.compiler.is_compiling() else _one_discriminator
        terms = [
            one(r, f, self.means[:, i], self.one_sided, self.weight)
            for i, (r, f) in enumerate(zip(reals, fakes, strict=True))
        ]
        return sum(terms[1:], terms[0])

    @torch.no_grad()
    def _update(self, logits):
        # The newest counts 1 of the weights so far, an update before it d, and so on: divided by
        # their sum, there is no bias towards the start. New tensors, not in place: the graph of an
        # earlier call holds the old ones.
        self.weights = torch.add(1, self.weights, alpha=self.decay)
        new = torch.stack([x.mean() for x in logits]).to(self.means).view_as(self.means)
        self.means = torch.lerp(self.means, new, self.weights.reciprocal())


class _OneDiscriminator(torch.autograd.Function):
    """weight · (mean (r - α_f)² + mean (f - α_r)²), (α_r, α_f) = `means`, constants. What is kept
    is the differences: each gradient is one multiplication."""

    @staticmethod
    def forward(ctx, real, fake, means, one_sided, weight):
        above, below = real - means[1], fake - means[0]
        if one_sided:
            above, below = above.clamp_(min=0), below.clamp_(max=0)
        ctx.save_for_backward(real, fake, means, above, below)
        ctx.one_sided, ctx.weight = one_sided, weight
        return above.square().mean().add_(below.square().mean()).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        real, fake, means, above, below = ctx.saved_tensors
        if torch.is_grad_enabled():
            above, below = real - means[1], fake - means[0]
            if ctx.one_sided:
                above, below = above.clamp(min=0), below.clamp(max=0)
        grad = grad * (2 * ctx.weight)
        return (
            above * (grad / max(1, above.numel())),
            below * (grad / max(1, below.numel())),
            None,
            None,
            None,
        )


_one_discriminator = entry(_OneDiscriminator)
