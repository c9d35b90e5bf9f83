"""Self-attention by distance, after GigaGAN."""

import torch
from torch import Tensor, nn

import genkern


class L2SelfAttention2d(nn.Module):
    """to_out(softmax(-scale·‖q_i - k_j‖²)·v), over the pixels of an image and one null token.

    q = to_q(x), and the keys are the queries themselves: with logits by distance and tied q and k
    the block is Lipschitz (Kim et al. 2021), which keeps a discriminator's training stable. A
    learned null key and value a head, null_kv, let a pixel look at nothing. All three maps are 1×1
    convolutions without bias. Kang et al. 2023 (GigaGAN), sec. 3.2, with the null token, the
    arguments and the parameter names of the public gigagan-pytorch; its normalisation before and
    the residual around stay with the caller: x + attention(norm(x)).

    Unlike a distance matrix's square root, its gradients of any order are finite where q = k.

    Args:
        channels: C of the images.
        heads: the number of heads.
        dim_head: features of a head, d.
        scale: what a squared distance is multiplied by; 1/√d by default.

    Shape: x [B, C, H, W], any float dtype; the result is like x.

    Raises ValueError for sizes that are not positive and for an input of another shape.
    """

    def __init__(
        self, channels: int, heads: int = 8, dim_head: int = 64, *, scale: float | None = None
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("heads", heads), ("dim_head", dim_head)):
            if size < 1:
                raise ValueError(f"L2SelfAttention2d: {name} must be positive, not {size}")
        self.channels, self.heads, self.dim_head = channels, heads, dim_head
        self.scale = dim_head**-0.5 if scale is None else scale
        self.to_q = nn.Conv2d(channels, heads * dim_head, 1, bias=False)
        self.to_v = nn.Conv2d(channels, heads * dim_head, 1, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, heads, dim_head))
        self.to_out = nn.Conv2d(heads * dim_head, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"L2SelfAttention2d: x must be [B, {self.channels}, H, W], not {list(x.shape)}"
            )
        queries, values = (self._as_heads(image) for image in (self.to_q(x), self.to_v(x)))
        null_key, null_value = self.null_kv.to(queries.dtype).unsqueeze(2)
        attended = genkern.attention(
            queries,
            _before(null_key, queries),
            _before(null_value, values),
            scale=self.scale,
            similarity="l2",
        )
        return self.to_out(attended.mT.flatten(1, 2).unflatten(2, x.shape[2:]))

    def _as_heads(self, image):
        """[B, heads·d, H, W] as [B, heads, H·W, d], a view."""
        return image.flatten(2).unflatten(1, (self.heads, self.dim_head)).mT

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, heads={self.heads}, dim_head={self.dim_head}, "
            f"scale={self.scale:.4g}"
        )


def _before(token, sequence):
    """One token [heads, 1, d] before each sequence [B, heads, N, d]."""
    return torch.cat([token.expand(len(sequence), -1, -1, -1), sequence], 2)
