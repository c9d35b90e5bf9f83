"""The self-attention block of SAGAN, in the form that BigGAN gave it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genkern


class SelfAttention2d(nn.Module):
    """x + gamma · o(softmax(theta(x)ᵀ · phi(x)) · g(x)), over the pixels of an image.

    theta, phi, g and o are 1×1 convolutions without bias; phi and g are max-pooled by 2, so N = H·W
    pixels look at M = N/4 places. One head of d = C/8 with values of dv = C/2, and no 1/√d. gamma
    starts at 0: the block begins as the identity. Zhang et al. 2019 (SAGAN), with the pooling and
    the parameter names of BigGAN-PyTorch (Brock et al. 2019), whose weights load as they are.

    Args:
        channels: C, a multiple of 8.

    Shape: x [B, C, H, W] with H, W ≥ 2, any float dtype; the result is like x.

    Raises ValueError for `channels` that 8 does not divide and for an input of another shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 8 or channels % 8:
            raise ValueError(
                f"SelfAttention2d: channels must be a positive multiple of 8, not {channels}"
            )
        self.channels = channels
        self.theta = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.o = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < 2:
            raise ValueError(
                f"SelfAttention2d: x must be [B, {self.channels}, H, W] with H, W ≥ 2, "
                f"not {list(x.shape)}"
            )
        queries = _as_sequence(self.theta(x))
        keys = _as_sequence(F.max_pool2d(self.phi(x), 2))
        values = _as_sequence(F.max_pool2d(self.g(x), 2))
        looked_up = genkern.attention(queries, keys, values, scale=1.0)
        looked_up = looked_up.squeeze(1).mT.unflatten(2, x.shape[2:])
        return x + self.gamma * self.o(looked_up)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def _as_sequence(image: Tensor) -> Tensor:
    """[B, C, H, W] as one head of H·W tokens: [B, 1, H·W, C], a view."""
    return image.flatten(2).mT.unsqueeze(1)
