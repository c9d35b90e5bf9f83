"""The exponential moving average of a model's weights, as GANs sample from it."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` whose parameters follow its own: p ← m·p + (1 - m)·p_model, on every
    `update_parameters(model)`, with m = min(decay, (1 + n) / (10 + n)) at the n-th update, so that
    the start is soon forgotten.

    Buffers are copied, not averaged: an average of the unit vectors u and v of spectral norm is
    shorter than 1 and underestimates σ. The copy is in eval mode.

    Raises ValueError for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"averaged: decay must be in [0, 1), not {decay}")

    @torch.no_grad()
    def move(averages, parameters, updates):
        n = float(updates)
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + n) / (10 + n)))

    copy = AveragedModel(model, multi_avg_fn=move, use_buffers=False).requires_grad_(False)
    return copy.eval()
