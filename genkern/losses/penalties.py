"""Gradient penalties."""

import torch


def r1(logits, inputs, gamma=1.0):
    """R1: γ/2 · mean over samples of Σ (∂ΣD/∂x)²  (Mescheder et al. 2018, eq. 9).

    logits: the discriminator's output for `inputs`, any shape, still attached to its graph. inputs:
    `[batch, …]`, with requires_grad set before the discriminator saw it. Returns a 0-dim tensor,
    differentiable in the discriminator's weights. Given fake samples this is R2.
    """
    if not inputs.requires_grad:
        raise ValueError(
            "losses.r1: inputs must require gradients before the discriminator sees them: call "
            "inputs.requires_grad_() first"
        )
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.square().sum() * (0.5 * gamma / max(1, inputs.shape[0]))
