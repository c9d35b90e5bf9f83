"""ALiBi as an additive bias."""

import math

import torch

from genkern.ops.attention.arguments import ALIGNMENTS


def alibi(
    heads,
    N,
    M=None,
    *,
    alignment="upper_left",
    slopes=None,
    dtype=torch.float32,
    device=None,
):
    """slope_h·(j - i - offset), for `attn_mask`: what is far behind counts less.

    Args:
        heads: how many heads.
        N, M: how many queries and keys; M is N if not given.
        alignment: "upper_left": offset 0, query i stands at key i; "lower_right": offset M - N, the
            last query stands at the last key.
        slopes: [heads], a tensor (its gradient is kept) or a list; default those of the paper,
            2^(-8·h/heads) for h = 1 … heads, and for a number of heads that is no power of two
            those of the power of two below, then every second one of twice that number.
        dtype, device: of the result.

    Returns [heads, N, M]. Query i sees the keys after it with a positive bias: ALiBi is meant to be
    used with is_causal=True.

    Raises ValueError for another alignment, a negative size or slopes of another shape.

    Source: Press et al. 2022, https://arxiv.org/abs/2108.12409.
    """
    M = N if M is None else M
    if min(heads, N, M) < 0:
        raise ValueError(
            f"alibi: heads, N and M must not be negative, but are {heads}, {N} and {M}"
        )
    if alignment not in ALIGNMENTS:
        raise ValueError(
            f"alibi: alignment must be 'upper_left' or 'lower_right', not {alignment!r}"
        )
    slopes = torch.as_tensor(
        _slopes(heads) if slopes is None else slopes, dtype=torch.float64, device=device
    )
    if slopes.shape != (heads,):
        raise ValueError(f"alibi: slopes must have the shape ({heads},), not {tuple(slopes.shape)}")
    offset = M - N if alignment == "lower_right" else 0
    i = torch.arange(N, device=device)[:, None]
    j = torch.arange(M, device=device)
    return (slopes[:, None, None] * (j - i - offset)).to(dtype)


def _slopes(heads):
    if heads == 0:
        return []
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]
