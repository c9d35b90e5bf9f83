"""The self-attention block of SAGAN, in the form that BigGAN gave it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genkern
from genkern.nn.spectral_norm.layer import normalization

CONVOLUTIONS = ("theta", "phi", "g", "o")


class SelfAttention2d(nn.Module):
    """x + gamma · o(softmax(theta(x)ᵀ · phi(x)) · g(x)), over the pixels of an image.

    theta, phi, g and o are 1×1 convolutions without bias; phi and g are max-pooled by 2, so N = H·W
    pixels look at M = N/4 places. One head of d = C/8 with values of dv = C/2, and no 1/√d. gamma
    starts at 0: the block begins as the identity. Zhang et al. 2019 (SAGAN), with the pooling, the
    arguments and the parameter names of BigGAN-PyTorch (Brock et al. 2019): its `layers.Attention`
    can be replaced by this, and its weights load as they are.

    Weights that BigGAN-PyTorch kept normalised (`theta.weight, theta.u0, theta.sv0, …`) load into a
    block after `genkern.spectral_norm(block, recurse=True)`, with the same σ in eval mode; into
    another block load_state_dict raises its RuntimeError.

    Args:
        channels: C, a multiple of 8.
        which_conv: makes the convolutions, called like `nn.Conv2d`.

    Shape: x [B, C, H, W] with H, W ≥ 2, any float dtype; the result is like x. A second argument is
    BigGAN's class condition, which the block has no use for.

    Raises ValueError for `channels` that 8 does not divide and for an input of another shape.
    """

    def __init__(self, channels: int, which_conv=nn.Conv2d) -> None:
        super().__init__()
        if channels < 8 or channels % 8:
            raise ValueError(
                f"SelfAttention2d: channels must be a positive multiple of 8, not {channels}"
            )
        self.channels = channels
        self.theta = which_conv(channels, channels // 8, kernel_size=1, padding=0, bias=False)
        self.phi = which_conv(channels, channels // 8, kernel_size=1, padding=0, bias=False)
        self.g = which_conv(channels, channels // 2, kernel_size=1, padding=0, bias=False)
        self.o = which_conv(channels // 2, channels, kernel_size=1, padding=0, bias=False)
        # One element and not none of dimensions, as BigGAN's: FSDP2 shards no scalars.
        self.gamma = nn.Parameter(torch.zeros(1))
        self.register_load_state_dict_pre_hook(_translate_biggan)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
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


def _translate_biggan(block, state_dict, prefix, *others):
    """Gives BigGAN-PyTorch's gamma our shape, before it is loaded. Its normalised weights are
    translated by the layers that are normalised; here it is said where one isn't."""
    gamma = state_dict.get(f"{prefix}gamma")
    if gamma is not None and gamma.dim() == 0:
        state_dict[f"{prefix}gamma"] = gamma.reshape(1)
    for name in CONVOLUTIONS:
        convolution = getattr(block, name)
        if f"{prefix}{name}.u0" not in state_dict or "u0" in dict(convolution.named_buffers()):
            continue
        if normalization(convolution, "weight") is None:
            error_messages = others[-1]
            error_messages.append(
                f"SelfAttention2d: {prefix}{name}.u0 is BigGAN's spectral normalisation, and this "
                f"block has none: call genkern.spectral_norm(block, recurse=True) before loading."
            )
