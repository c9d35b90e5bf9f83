"""StyleGAN2's path length regularisation."""

import math

import torch
from torch import Tensor, nn

from genkern.ops.sample_norms.op import sample_norms


class PathLength(nn.Module):
    """weight · mean_i (ℓ_i - a)²,  ℓ_i = ‖J_iᵀ y‖  (Karras et al. 2020, StyleGAN2, eq. 4)

    J_i is the Jacobian of the generator's image i with respect to its latent, y normal noise
    divided by √(H·W), and a the running mean of ℓ, of which each call brings in a share 1 - decay
    (StyleGAN2's pl_decay is that share, 0.01). Where the latent has several rows (one a layer), ℓ²
    is the mean over rows. As in StyleGAN2's code the gradient also runs through the share of ℓ in
    a. The mean is a buffer on the module's device, and nothing waits for it; in eval mode it stays.

        path_length = PathLength()
        loss = path_length(G.synthesis(w), w)         # every 4th step, times 4: see `losses.lazy`
    """

    def __init__(self, weight: float = 2.0, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"losses.PathLength: decay must be in [0, 1), not {decay}")
        self.weight, self.decay = weight, decay
        self.register_buffer("mean_length", torch.zeros(()))

    def forward(self, images: Tensor, latents: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """The penalty, 0-dim, differentiable in the generator's weights.

        images: `[batch, channels, …]` as the generator made them of latents `[batch, w]` or
        `[batch, rows, w]`, which require gradients. noise: y before its division, of the images'
        shape; drawn from torch's generator if not given.
        """
        if not latents.requires_grad:
            raise ValueError("losses.PathLength: latents must require gradients")
        if images.dim() < 2 or latents.dim() < 2 or len(images) != len(latents):
            raise ValueError(
                f"losses.PathLength: images [batch, channels, …] and latents [batch, …, w] must "
                f"have one batch, not shapes {tuple(images.shape)} and {tuple(latents.shape)}"
            )
        noise = torch.randn_like(images) if noise is None else noise
        noise = noise / math.sqrt(math.prod(images.shape[2:]))
        (slope,) = torch.autograd.grad(images, latents, noise, create_graph=True)
        rows = math.prod(latents.shape[1:-1])
        lengths = (sample_norms([[slope]], "squares") / rows).sqrt()
        mean = self.mean_length.to(lengths.dtype)
        if self.training:
            mean = torch.lerp(mean, lengths.mean(), 1 - self.decay)
            self.mean_length.copy_(mean.detach())
        return self.weight * (lengths - mean).square().mean()
