"""What attention means, in plain PyTorch: any dtype, any number of derivatives."""

import torch


def attention(q, k, v, is_causal=False, scale=1.0, rounded=True):
    """softmax(scale·q·kᵀ)·v over the allowed keys; zeros where a row has none.

    q [..., N, d], k [..., M, d], v [..., M, dv] -> [..., N, dv]. Causal: query i sees keys j ≤ i.
    Half precision is computed in fp32 and rounded once, or not at all. The N×M matrix is stored.
    """
    out = _logits(q, k, is_causal, scale).softmax(-1) @ _wide(v)
    return out.to(q.dtype) if rounded else out


def softmax_rows(q, k, is_causal=False, scale=1.0):
    """[2, ..., N], what kernels keep of the softmax: of each row the shift m, the largest
    sign(scale)·q·k, and Σ exp(|scale|·(sign(scale)·q·k - m)); zeros where a row has no key.
    log Σ exp S = |scale|·m + log of that sum."""
    products = _logits(q, k, is_causal, (scale > 0) - (scale < 0))
    if products.shape[-1] == 0:
        return products.new_zeros((2, *products.shape[:-1]))
    shift = products.amax(-1)
    exponents = (products - shift[..., None]) * (abs(scale) or 1.0)
    return torch.stack([shift, exponents.exp().sum(-1)])


def _logits(q, k, is_causal, scale):
    logits = scale * (_wide(q) @ _wide(k).transpose(-2, -1))
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits


def _wide(x):
    return x.float() if x.element_size() < 4 else x
